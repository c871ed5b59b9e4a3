"""One of two ranks over gloo, each with half of a sequence on its (simulated) NPU, while somebody's attention stands in
the place of torch's: it gathers the keys of both. Writes down how far logits and gradients are from one rank's.

python tests/support/context_parallel_ranks.py DIRECTORY   # with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])
from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

import npu_patch
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny, tiny_batch

LENGTH = 24
TORCHS = F.scaled_dot_product_attention


def gathered(tensor: Tensor) -> Tensor:
    """`[B, N, S, D]` of this rank -> that of both."""
    return torch.cat(all_gather(tensor.cpu().contiguous()), 2).to(tensor.device)


def over_both_ranks(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **others: Any) -> Tensor:
    assert attn_mask is None and others.pop("is_causal")
    rows = torch.arange(query.shape[2], device=query.device) + dist.get_rank() * query.shape[2]
    seen = torch.arange(LENGTH, device=query.device) <= rows[:, None]
    return TORCHS(query, gathered(key), gathered(value), attn_mask=seen, **others)


def logits_and_gradients(model: torch.nn.Module, ids: Tensor, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    (logits * torch.cos(positions)[..., None]).square().sum().backward()
    return logits.detach().cpu(), [parameter.grad.cpu() for parameter in model.parameters()]


def compared(model: torch.nn.Module, ids: Tensor, positions: Tensor, whole: tuple[Tensor, list[Tensor]]) -> float:
    """How far this rank's half is from the whole, and the sum of both ranks' gradients from its gradients."""
    mine = slice(dist.get_rank() * LENGTH // 2, (dist.get_rank() + 1) * LENGTH // 2)
    F.scaled_dot_product_attention = over_both_ranks
    try:
        logits, gradients = logits_and_gradients(model, ids[:, mine], positions[:, mine])
    finally:
        F.scaled_dot_product_attention = TORCHS
    for each in gradients:
        dist.all_reduce(each)
    errors = [relative_error(*pair) for pair in zip(gradients, whole[1], strict=True)]
    return max(relative_error(logits, whole[0][:, mine]), *errors)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    device = torch.device("npu:0")
    model = tiny("qwen3").to(device).train()
    ids = tiny_batch(length=LENGTH)["input_ids"][:1].to(device)
    positions = torch.arange(LENGTH, device=device)[None]
    whole = logits_and_gradients(model, ids, positions)
    found: dict[str, Any] = {"unpatched": compared(model, ids, positions, whole)}
    report = npu_patch.apply(model)
    found["patched"] = compared(model, ids, positions, whole)
    (attention,) = [o for o in report if o.site == "AttentionInterface['sdpa']"]
    found["ran"], found["reasons"] = attention.calls.ran, list(attention.calls.fell_through)
    Path(sys.argv[1], f"{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
