"""Counts what the experts of one layer cost in a LoRA step, on the simulated NPU.

    python scripts/count_moe.py

The layer is Qwen3-30B-A3B's block of 128 experts, 8 for each token, in bfloat16, with every side and the number of
tokens divided by 4: the proportion of weights to activations stays. It is frozen, and its input needs a gradient, as
where adapters are on attention. One forward and one backward, each way, in one process:

    eager         transformers' loop over experts
    grouped_mm    transformers' default
    npu_patch     permute, grouped matmul, SwiGLU, grouped matmul, unpermute; only the gradients asked for
    with dW       the same, also computing the gradients of the experts' weights and dropping them

The rules of counting are those of npu_patch/simulator/counters.py. Memory is torch_npu's own allocator's: `peak` above
what was there before the step, `kept` for the backward after the forward. What an emulated operator uses inside is not
counted; the real one's workspace is the vendor's.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch

import npu_patch

HIDDEN, INNER, EXPERTS, CHOICES, TOKENS = 512, 192, 128, 8, 1024
WAYS = ("eager", "grouped_mm", "npu_patch", "with dW")


@dataclass(frozen=True)
class Cost:
    launches: int
    bytes: int
    host_copies: int
    peak: int
    kept: int
    launches_by_op: dict[str, int]


def main() -> None:
    warnings.filterwarnings("ignore")
    block = built()
    costs = {way: measure(block, way) for way in WAYS}
    ours = costs["npu_patch"]
    weights = sum(p.numel() * p.element_size() for p in block.experts.parameters())
    print(f"{EXPERTS} experts of {HIDDEN} x {INNER}, {TOKENS} tokens, {CHOICES} experts each, bfloat16;")
    print(f"experts' weights {weights / 1e6:.1f} MB. Forward and backward of the block, counted on the simulated NPU.")
    print("In brackets: times npu_patch's.\n")
    header = ("", "launches", "MB moved", "host copies", "peak MB", "kept MB")
    print(f"{header[0]:<12}" + "".join(f"{title:>20}" for title in header[1:]))
    for way, cost in costs.items():
        cells = [
            _cell(cost.launches, ours.launches, f"{cost.launches}"),
            _cell(cost.bytes, ours.bytes, f"{cost.bytes / 1e6:.0f}"),
            f"{cost.host_copies}",
            _cell(cost.peak, ours.peak, f"{cost.peak / 1e6:.1f}"),
            _cell(cost.kept, ours.kept, f"{cost.kept / 1e6:.1f}"),
        ]
        print(f"{way:<12}" + "".join(f"{cell:>20}" for cell in cells))
    print("\nnpu_patch's launches:")
    for name, launches in sorted(ours.launches_by_op.items(), key=lambda row: -row[1]):
        print(f"{launches:>4} {name}")


def _cell(value: int, ours: int, text: str) -> str:
    return f"{text} ({value / ours:.2f})"


def built() -> torch.nn.Module:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=CHOICES
    )
    torch.manual_seed(0)
    block = Qwen3MoeSparseMoeBlock(config).bfloat16()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return block.to("npu").requires_grad_(False)


def measure(block: torch.nn.Module, way: str) -> Cost:
    block.experts.config._experts_implementation = "eager" if way == "eager" else "grouped_mm"
    block.experts.requires_grad_(way == "with dW")
    hooks = [p.register_post_accumulate_grad_hook(_drop) for p in block.experts.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    x, seed = (torch.randn(1, TOKENS, HIDDEN, generator=generator).bfloat16().to("npu") for _ in range(2))
    x.requires_grad_(True)
    with npu_patch.applied(block, patch=way in ("npu_patch", "with dW"), fused_ops=False):
        block(x).backward(seed)
        x.grad = None
        torch.npu.reset_peak_memory_stats()
        before = torch.npu.memory_allocated()
        with simulator.count() as counted:
            result = block(x)
            kept = torch.npu.memory_allocated() - before
            result.backward(seed)
    peak = torch.npu.max_memory_allocated() - before
    for hook in hooks:
        hook.remove()
    by_op = {name: launches for name, (launches, _) in counted.by_op.items()}
    return Cost(counted.launches, counted.bytes, counted.host_copies, peak, kept, by_op)


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


if __name__ == "__main__":
    main()
