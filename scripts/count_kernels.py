"""Counts what a decoder layer costs on the simulated NPU: unpatched, patched, and patched with the Triton kernels.

    python scripts/count_kernels.py

Launches and megabytes moved by the forward and backward of one layer in bfloat16, every weight with a gradient, for
Qwen3-0.6B's sizes and for a layer of either kind of Qwen3.5 with the same hidden size; 256 tokens, because the kernels
run in triton's interpreter (bytes of activations go with the tokens, launches do not). The rules of counting are those
of npu_patch/simulator/counters.py; a Triton kernel moves each tensor that it is given once.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
from torch import Tensor

import npu_patch
from npu_patch.kernels.readiness import why_not

TOKENS = 256
COMMON = {
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
WAYS = {"unpatched": {"patch": False}, "torch_npu": {"triton": False}, "triton": {"triton": True}}


def main() -> None:
    warnings.filterwarnings("ignore")
    lacking = why_not()
    if lacking is not None:
        raise SystemExit(f"the Triton kernels cannot run here: {lacking}")
    print(f"One decoder layer, {TOKENS} tokens, bfloat16, forward and backward, counted on the simulated NPU:")
    print("launches and megabytes moved\n")
    print(f"{'':<28}" + "".join(f"{way:>18}" for way in WAYS))
    found = {}
    for name, model, layer, inputs in layers():
        costs = {way: measure(model, layer, inputs, switches) for way, switches in WAYS.items()}
        cells = (f"{cost.launches:>8}{cost.bytes / 1e6:>10.1f}" for cost in costs.values())
        print(f"{name:<28}" + "".join(cells))
        found[name] = costs["triton"]
    for name, cost in found.items():
        ours = {op: count for op, (count, _) in cost.by_op.items() if op.startswith("triton::")}
        print(f"\nTriton launches of {name}: " + ", ".join(f"{count} {op[8:]}" for op, count in sorted(ours.items())))


def layers() -> Iterator[tuple[str, torch.nn.Module, torch.nn.Module, dict[str, object]]]:
    """Of each model its layers, with what they are called with."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig, Qwen3Config

    qwen3 = Qwen3Config(**COMMON, num_hidden_layers=1)
    qwen3_5 = Qwen3_5TextConfig(**COMMON, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    for name, config in (("Qwen3", qwen3), ("Qwen3.5", qwen3_5)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).bfloat16().to("npu")
        ids = torch.arange(TOKENS, device="npu")[None]
        hidden = torch.randn(1, TOKENS, COMMON["hidden_size"], dtype=torch.bfloat16, device="npu")
        tables = model.model.rotary_emb(hidden, ids)
        kinds = getattr(config, "layer_types", None) or ["full_attention"]
        for kind, layer in zip(kinds, model.model.layers, strict=True):
            inputs = {"hidden_states": hidden, "position_embeddings": tables, "attention_mask": None}
            yield f"{name}, {kind.replace('_', ' ')}", model, layer, inputs | {"position_ids": ids}


def measure(
    model: torch.nn.Module, layer: torch.nn.Module, inputs: dict[str, object], switches: dict[str, bool]
) -> simulator.Counted:
    model.zero_grad(set_to_none=True)
    hidden = inputs["hidden_states"].detach().requires_grad_()
    with npu_patch.applied(model, **switches), simulator.count() as counted:
        output = layer(**inputs | {"hidden_states": hidden})
        output = output if isinstance(output, Tensor) else output[0]
        output.backward(hidden.detach())
    return counted


if __name__ == "__main__":
    main()
