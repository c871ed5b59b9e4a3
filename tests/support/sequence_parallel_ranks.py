"""One of the ranks that share each sequence: how far loss, logits and gradients are from those of the whole sequences
on one device, patched and not; what is refused; and the highest memory. Written down.

python tests/support/sequence_parallel_ranks.py DIRECTORY   # with what torchrun sets
"""

# ruff: noqa: E402
from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[2])
from npu_patch import simulator

if simulator.real_device() is None:
    simulator.start()

import torch
import torch.distributed as dist
from torch import Tensor

import npu_patch
from npu_patch.sequence_parallel import SequenceParallel
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NPU = torch.device("npu", RANK)
LENGTH = 24
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}
PACKED = torch.tensor([[*range(7), *range(12), *range(5)]])
PADDED = (torch.arange(LENGTH)[None] < torch.tensor([[LENGTH], [17]])).long()
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor]]] = {
    "causal": ("qwen3", HEADS, {}, {}),
    "experts": ("qwen3_moe", HEADS, {}, {}),
    "sliding window": ("mistral", HEADS, {}, {}),
    "windows and not": ("gemma3", HEADS, {}, {}),
    "sinks": ("gpt_oss", HEADS, {"reference": "eager", "attn": "sdpa"}, {}),  # unpatched, sdpa knows no sinks
    "fewer key-value heads than ranks": ("qwen3", {**HEADS, "num_key_value_heads": 1}, {}, {}),
    "packed": ("qwen3", HEADS, {}, {"position_ids": PACKED}),
    "packed, flash attention": (
        "qwen3", HEADS, {"reference": "sdpa", "attn": "flash_attention_2"}, {"position_ids": PACKED},
    ),  # which transformers does not have here
    "padded": ("qwen3", HEADS, {}, {"attention_mask": PADDED}),
    "checkpointed": ("qwen3", HEADS, {"checkpointed": True}, {}),
}  # fmt: skip


def batch_of(extra: dict[str, Tensor]) -> dict[str, Tensor]:
    rows = 1 if "position_ids" in extra else 2
    ids = torch.randint(2, 101, (rows, LENGTH), generator=torch.Generator().manual_seed(3))
    labels = ids.clone()
    labels[0, : LENGTH // 2 + 3] = -100  # few on the first rank
    if "attention_mask" in extra:
        labels[extra["attention_mask"] == 0] = -100
    return {name: each.to(NPU) for name, each in {"input_ids": ids, "labels": labels, **extra}.items()}


def model_of(family: str, sizes: dict[str, Any], how: dict[str, Any]) -> torch.nn.Module:
    model = tiny(family, **sizes).to(NPU).train()
    if "reference" in how:
        model.config._attn_implementation = how["reference"]
    if how.get("checkpointed"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.cpu().double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def whole(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach().cpu().double(), **gradients(model)}


def divided(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], simulator.Counted]:
    parallel = SequenceParallel(model)
    try:
        with simulator.count() as counted, parallel.part(**batch) as part:
            loss = model(**part).loss
            loss.backward()
        again = model(**batch, use_cache=False).loss.item()  # whole sequences are attended to as before
    finally:
        parallel.close()
    means = {"loss": loss.detach().reshape(1), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}
    for mean in means.values():
        dist.all_reduce(mean, dist.ReduceOp.AVG)
    found = {"loss": means["loss"].cpu().double().reshape(()), **gradients(model), "again": torch.tensor(again)}
    return found, counted


def errors(name: str) -> dict[str, Any]:
    family, sizes, how, extra = CASES[name]
    model, batch = model_of(family, sizes, how), batch_of(extra)
    found: dict[str, Any] = {}
    expected = whole(model, batch)
    model.config._attn_implementation = how.get("attn", model.config._attn_implementation)
    for patch in (True,) if "reference" in how else (False, True):
        with warnings.catch_warnings(), npu_patch.applied(model, patch=patch) as report:
            warnings.simplefilter("ignore")
            result, counted = divided(model, batch)
        again = result.pop("again").item()
        assert result.keys() == expected.keys(), result.keys() ^ expected.keys()
        worst = max(relative_error(result[each], expected[each]) for each in expected)
        ran = sorted({o.patch for o in report.patched if o.calls.ran})
        found["patched" if patch else "unpatched"] = {
            "error": worst,
            "again": abs(again / expected["loss"].item() - 1),
            "exchanges": counted.collectives_by_call["HcclAlltoAll"][0],
            "waits": counted.host_copies,
            "copies": [name for name in counted.by_op if name.startswith("contiguous(inside")],
            "ran": ran,
            "implementation": model.config._attn_implementation,
        }
    return found


def refused() -> dict[str, str]:
    def said(make: Any) -> str:
        try:
            make()
        except ValueError as error:
            return str(error)
        return "nothing"

    def of_tokens() -> None:
        parallel = SequenceParallel(model_of("qwen3", HEADS, {}))
        try:
            with parallel.part(torch.ones(1, 2 * WORLD + 1, dtype=torch.long, device=NPU)):
                pass
        finally:
            parallel.close()

    odd = {"num_attention_heads": 2 * WORLD + 1, "num_key_value_heads": 2 * WORLD + 1}
    three = {"num_attention_heads": 12, "num_key_value_heads": 3}
    return {
        "heads": said(lambda: SequenceParallel(model_of("qwen3", odd, {}))),
        "key heads": said(lambda: SequenceParallel(model_of("qwen3", three, {}))),
        "eager": said(lambda: SequenceParallel(model_of("qwen3", HEADS, {"reference": "eager"}))),
        "state": said(lambda: SequenceParallel(model_of("qwen3_5", HEADS, {}))),
        "tokens": said(of_tokens),
    }  # fmt: skip


def unlike() -> dict[str, str]:
    """Another switch on each rank; then one that does not ask."""
    said = {}
    npu_patch.apply(rope=RANK == 0)
    for name, timeout in (("switches", 60.0), ("silent", 1.0)):
        if name == "switches" or RANK == 0:
            try:
                npu_patch.require_same_on_all_ranks(timeout)
            except npu_patch.PatchError as error:
                said[name] = str(error)
    npu_patch.restore()
    return said


def peaks() -> dict[str, int]:
    """The highest device memory of a step beyond the model's, whole and divided."""
    model = model_of("qwen3", {**HEADS, "num_hidden_layers": 1}, {})
    ids = torch.randint(2, 101, (1, 2048), generator=torch.Generator().manual_seed(3)).to(NPU)
    batch = {"input_ids": ids, "labels": ids}
    found = {}
    with npu_patch.applied(model):
        for name, step in {"whole": lambda: whole(model, batch), "divided": lambda: divided_once(model, batch)}.items():
            step()
            torch.npu.reset_peak_memory_stats()
            before = torch.npu.memory_allocated()
            step()
            found[name] = torch.npu.max_memory_allocated() - before
    return found


def divided_once(model: torch.nn.Module, batch: dict[str, Tensor]) -> None:
    parallel = SequenceParallel(model)
    with parallel.part(**batch) as part:
        model(**part).loss.backward()
    parallel.close()
    model.zero_grad()


if __name__ == "__main__":
    torch.npu.set_device(NPU)
    torch.set_num_threads(1)
    dist.init_process_group("hccl")
    written = {
        "cases": {name: errors(name) for name in CASES},
        "refused": refused(),
        "unlike": unlike(),
        "peaks": peaks(),
    }
    Path(sys.argv[1], f"{RANK}.json").write_text(json.dumps(written))
    dist.destroy_process_group()
