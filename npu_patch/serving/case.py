"""An op at the sizes that a model calls it with, and what was found of an alternative there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FEW_TOKENS = 5

# Relative to the largest element. Results are rounded once or twice; a wrong one is off by its own size.
ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# Of operators that multiply matrices: a device may take float32 ones in parts of fewer bits.
ALLOWED_OF_PRODUCTS = {**ALLOWED, torch.float32: 1e-3}

OUT_OF_MEMORY = "no room on the device to measure it"
DEVICE_LOST = "the device does not answer any more"
ACCIDENTS = (OUT_OF_MEMORY, DEVICE_LOST)  # they say nothing of the next process

Stopwatch = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Alternative:
    """`unsupported`: of an implementation, what says of a call why it does not take it."""

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] | None = None


@dataclass(frozen=True)
class Case:
    """An op at the sizes that a model calls it with.

    `name` tells it from every other case of the op, and says to the reader of a report what it is.
    `inputs(tokens)`: shapes and dtypes for so many tokens. `call(run, *inputs)` is the call of an alternative's `run`,
    `definition(*inputs)` the same in plain torch, for float64. Each returns one tensor; every input gets a gradient,
    unless it is one that is not `differentiated`. It is checked at each number of `tokens`, to the bars `allowed`.
    `why_not(unsupported, *inputs)`: why an implementation lets such a call through to the original, if it does; then
    there is nothing to check.
    """

    op: str
    name: str
    inputs: Callable[[int], Sequence[tuple[tuple[int, ...], torch.dtype]]]
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    original: Alternative | None = None
    tokens: tuple[int, ...] = (FEW_TOKENS,)
    allowed: Mapping[torch.dtype, float] = field(default_factory=lambda: ALLOWED)
    differentiated: bool = True
    why_not: Callable[..., str | None] | None = None

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Measured:
    """What became of one alternative: why it is wrong, or its median time in seconds, or neither: it is right, and was
    not timed."""

    wrong: str | None = None
    seconds: float | None = None
