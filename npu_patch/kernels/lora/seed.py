"""The seed of a group's masks: a number of the host's, made of the state of the device's generator.

The generator moves on as by an operator that draws from it, but nothing is launched. Whoever keeps its state and puts
it back (checkpoints, trackers for ranks of tensor parallelism) gets the same masks again. While a graph is captured
its state is not the host's to read: an operator then draws the seed, at each replay another one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEP = 4  # a Philox generator gives four numbers at each offset
LARGEST = 2**63 - 1
BITS = 2**64 - 1
PHILOX = ("cuda", "npu")


def drawn_seed(device: torch.device) -> int | Tensor:
    """An int64, or one on the device, `[1]`."""
    if device.type not in PHILOX:
        return of_one_kind(int(torch.randint(LARGEST, ())))
    generator: Any = getattr(torch, device.type).default_generators[device.index]
    try:
        offset = generator.get_offset()
    except RuntimeError:
        return torch.randint(LARGEST, (1,), device=device)
    generator.set_offset(offset + STEP)
    return of_one_kind(mixed(generator.initial_seed(), offset))


def mixed(seed: int, offset: int) -> int:
    """Splitmix64: states that follow each other give seeds that have nothing in common."""
    found = (seed + (offset + 1) * 0x9E3779B97F4A7C15) & BITS
    found = ((found ^ (found >> 30)) * 0xBF58476D1CE4E5B9) & BITS
    found = ((found ^ (found >> 27)) * 0x94D049BB133111EB) & BITS
    return found ^ (found >> 31)


def of_one_kind(seed: int) -> int:
    """Positive, odd and of 63 bits: triton compiles a kernel anew for numbers of each other kind."""
    return seed >> 1 | 1 << 62 | 1
