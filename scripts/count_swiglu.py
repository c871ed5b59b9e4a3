"""Counts what SwiGLU costs on the simulated NPU: silu and mul, or concatenating for npu_swiglu.

    python scripts/count_swiglu.py

Launches, bytes moved and values kept for the backward, for gate and up of shape [1, 4096, 6144] in bfloat16. The rules
of counting are those of npu_patch/simulator/counters.py.

The gradients of gate and up count as a feed-forward layer consumes them: handed on, not accumulated. Those of the
concatenation are the two halves of one tensor, views; "copied" adds the copies of a consumer that needs them whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from npu_patch import simulator

if not simulator.is_active():
    simulator.start()

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

SHAPE = (1, 4096, 6144)


COLUMNS = ("forward", "backward", "both")


def main() -> None:
    elements = torch.Size(SHAPE).numel()
    print(f"gate and up {list(SHAPE)} bfloat16, {elements:,} elements each, counted on the simulated NPU:")
    print("launches, megabytes moved, bytes moved per element; values kept for the backward per element\n")
    print(f"{'':<24}" + "".join(f"{column:^23}" for column in COLUMNS) + f"{'kept':>6}")
    for name, swiglu, copied in (
        ("silu, mul", silu_and_mul, False),
        ("cat, npu_swiglu", concatenated, False),
        ("cat, npu_swiglu, copied", concatenated, True),
    ):
        cost = measure(swiglu, copied)
        cells = (
            (cost.launches_forward, cost.bytes_forward),
            (cost.launches_backward, cost.bytes_backward),
            (cost.launches_forward + cost.launches_backward, cost.bytes_forward + cost.bytes_backward),
        )
        row = "".join(f"{launches:>6}{moved / 1e6:>9.1f}{moved / elements:>6.1f}  " for launches, moved in cells)
        print(f"{name:<24}{row}{cost.kept / elements:>6.2f}")


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def concatenated(gate: Tensor, up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(torch.cat((gate, up), -1), dim=-1)


@dataclass(frozen=True)
class Cost:
    launches_forward: int
    bytes_forward: int
    launches_backward: int
    bytes_backward: int
    kept: int  # values in distinct storages


def measure(swiglu: Callable[[Tensor, Tensor], Tensor], copied: bool) -> Cost:
    gate, up = (torch.randn(SHAPE, dtype=torch.bfloat16, device="npu", requires_grad=True) for _ in range(2))
    gradient = torch.randn(SHAPE, dtype=torch.bfloat16, device="npu")
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes() // tensor.element_size()
        return tensor

    with simulator.count() as forward, saved_tensors_hooks(keep, lambda tensor: tensor):
        output = swiglu(gate, up)
    with simulator.count() as backward:
        gradients = torch.autograd.grad(output, (gate, up), gradient)
        if copied:
            gradients = [each.contiguous() for each in gradients]
    return Cost(forward.launches, forward.bytes, backward.launches, backward.bytes, sum(kept.values()))


if __name__ == "__main__":
    main()
