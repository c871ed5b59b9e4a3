"""An op at the sizes that a model calls it with, and what was found of an alternative there."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from npu_patch.serving.implementation import Call, Implementation, Result
from npu_patch.serving.op import Op

FEW_TOKENS = 5

# Relative to the largest element. Results are rounded once or twice; a wrong one is off by its own size.
ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
# Of operators that multiply matrices: a device may take float32 ones in parts of fewer bits.
ALLOWED_OF_PRODUCTS = {**ALLOWED, torch.float32: 1e-3}

OUT_OF_MEMORY = "no room on the device to measure it"
DEVICE_LOST = "the device does not answer any more"
ACCIDENTS = (OUT_OF_MEMORY, DEVICE_LOST)  # they say nothing of the next process

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Alternative:
    """`unsupported`: of an implementation, what says of a call why it does not take it."""

    name: str
    run: Callable[..., Any]
    unsupported: Callable[..., str | None] | None = None


class Calling(Protocol[Call]):
    """How a function that takes an op's calls is called on a case's inputs."""

    def __call__(self, function: Callable[Call, Returned], /, *inputs: Any, **none: Any) -> Returned: ...


@dataclass(frozen=True)
class Case(Generic[Call, Result]):
    """An op at the sizes that a model calls it with.

    `name` tells it from every other case of the op, and says to the reader of a report what it is.
    `inputs(tokens)`: shapes and dtypes for so many tokens. `call(function, *inputs)` is a call of whatever takes the
    op's calls: an implementation's `run` and `unsupported`, the op's `key` and `exact`. Every input gets a gradient,
    unless it is one that is not `differentiated`. It is checked at each number of `tokens`, to the bars `allowed`.
    `timed_tokens`: at how many of them it is timed; 0 for a case that times do not decide, None for as many as a large
    call has.
    """

    op: Op[Call, Result]
    name: str
    inputs: Callable[[int], Sequence[tuple[tuple[int, ...], torch.dtype]]]
    call: Calling[Call]
    original: Alternative | None = None
    tokens: tuple[int, ...] = (FEW_TOKENS,)
    allowed: Mapping[torch.dtype, float] = field(default_factory=lambda: ALLOWED)
    differentiated: bool = True
    timed_tokens: int | None = None

    @property
    def title(self) -> str:
        return f"{self.op.name}: {self.name}"

    def key(self) -> Hashable:
        """The op's, of the calls that this one stands for."""
        return self.call(self.op.key, *self._meta())

    def why_not_by(self, implementation: Implementation[Call, Result]) -> str | None:
        """Why it does not take the calls that this one stands for, or None."""
        return self.call(implementation.unsupported, *self._meta())

    def _meta(self) -> list[Tensor]:
        return [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype in self.inputs(self.tokens[0])]

    def definition(self, *inputs: Tensor) -> Result:
        return self.call(self.op.exact, *inputs)


AnyCase = Case[..., Any]


@dataclass(frozen=True)
class Measured:
    """What became of one alternative: why it is wrong, or its median time in seconds with the `quartiles`, or neither:
    it is right, and was not timed."""

    wrong: str | None = None
    seconds: float | None = None
    quartiles: tuple[float, float] | None = None

    def clearly_faster_than(self, other: Measured) -> bool:
        """Three quarters of its samples are below three quarters of the other's. Both were timed."""
        return self._span[1] < other._span[0]

    @property
    def _span(self) -> tuple[float, float]:
        seconds = math.nan if self.seconds is None else self.seconds
        return self.quartiles or (seconds, seconds)


Clock = Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Measured]]  # times ways to do the same
