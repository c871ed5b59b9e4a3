"""Compares alternatives of an op at the shapes a model has: is each correct, how long does it take, which is taken.

    found = measure(case, Alternative("triton", run), device, stopwatch(device))

An alternative is checked first, against the case's definition in float64 on a few tokens, outputs and gradients; one
that is wrong is not timed and never taken. The times are medians, forward and backward together, of a few
milliseconds altogether beside what a kernel's first run compiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.probe.closeness import difference
from npu_patch.probe.room import quiet_room, values

FEW_TOKENS = 5
ELEMENTS = 2**24  # of the largest input that is timed: far more than a launch costs
WARM_UPS, RUNS, IN_A_ROW = 3, 7, 4
# Relative to the largest element. Results are rounded once or twice; a wrong one is off by its own size.
ALLOWED = {torch.float32: 1e-5, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}
GRADIENTS = 4.0  # times ALLOWED: a gradient passes through several roundings
OUT_OF_MEMORY = "no room on the device to measure it"
Stopwatch = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Alternative:
    name: str
    run: Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """An op at the sizes that a model calls it with.

    `name` tells it from every other case of the op, and says to the reader of a report what it is.
    `inputs(tokens)`: shapes and dtypes for so many tokens. `call(run, *inputs)` is the call of an alternative's `run`,
    `definition(*inputs)` the same in plain torch, for float64. Each returns one tensor; every input gets a gradient.
    """

    op: str
    name: str
    inputs: Callable[[int], Sequence[tuple[tuple[int, ...], torch.dtype]]]
    call: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    original: Alternative | None = None

    @property
    def key(self) -> str:
        return f"{self.op}: {self.name}"


@dataclass(frozen=True)
class Measured:
    """What became of one alternative: why it is wrong, or its median time in seconds."""

    wrong: str | None = None
    seconds: float | None = None


def measure(case: Case, alternative: Alternative, device: torch.device, stopwatch: Stopwatch) -> Measured:
    """Checks, then times. An alternative that raises is a wrong one."""
    try:
        with quiet_room(), torch.autocast(device.type, enabled=False):
            wrong = why_wrong(case, alternative, device)
            return Measured(wrong) if wrong else Measured(seconds=_median_time(case, alternative, device, stopwatch))
    except torch.OutOfMemoryError:
        return Measured(OUT_OF_MEMORY)
    except Exception as error:
        return Measured(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def faster(alternatives: Sequence[tuple[str, Measured]], incumbent: Measured) -> str | None:
    """The name of the fastest correct alternative if it beats the incumbent, else None."""
    timed = [(measured.seconds, name) for name, measured in alternatives if measured.seconds is not None]
    if not timed or incumbent.seconds is None or min(timed)[0] >= incumbent.seconds:
        return None
    return min(timed)[1]


def why_wrong(case: Case, alternative: Alternative, device: torch.device) -> str | None:
    """How far outputs and gradients on a few tokens are from the definition in float64, if too far."""
    kinds = case.inputs(FEW_TOKENS)
    given = [values(shape, 10 + index, dtype) for index, (shape, dtype) in enumerate(kinds)]
    leaves = [each.to(device).requires_grad_() for each in given]
    exact_leaves = [each.double().requires_grad_() for each in given]
    output = case.call(alternative.run, *leaves)
    exact = case.definition(*exact_leaves)
    weights = values(exact.shape, 90, output.dtype)
    found = torch.autograd.grad(output, leaves, weights.to(device))
    exact_found = torch.autograd.grad(exact, exact_leaves, weights.double())
    half = [dtype for _, dtype in kinds if dtype != torch.float32]
    allowed = ALLOWED[half[0] if half else torch.float32]
    results = [("the output", output, exact, allowed)]
    for index, (one, other) in enumerate(zip(found, exact_found, strict=True)):
        results.append((f"the gradient of input {index}", one, other, GRADIENTS * allowed))
    for name, one, other, bar in results:
        far = difference(one.detach().cpu().double(), other.detach())
        if not far <= bar:
            return f"self-check: {name} is {far:.2g} of its size off"
    return None


def _median_time(case: Case, alternative: Alternative, device: torch.device, stopwatch: Stopwatch) -> float:
    widest = max(shape[-1] for shape, _ in case.inputs(1))
    kinds = case.inputs(max(1, ELEMENTS // widest))
    leaves = [torch.ones(shape, dtype=dtype, device=device).requires_grad_() for shape, dtype in kinds]
    gradient = torch.ones_like(case.call(alternative.run, *leaves))

    def forward_and_backward() -> None:
        torch.autograd.grad(case.call(alternative.run, *leaves), leaves, gradient)

    for _ in range(WARM_UPS):
        forward_and_backward()
    return statistics.median(stopwatch(forward_and_backward) for _ in range(RUNS))


def stopwatch(device: torch.device) -> Stopwatch:
    """Seconds that one of several calls in a row takes on `device`: as in training, the host launches the next while
    the device is at one, so that launching counts only where it takes longer."""
    synchronize = getattr(torch, device.type).synchronize

    def seconds(function: Callable[[], Any]) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            function()
        synchronize()
        return (time.perf_counter() - start) / IN_A_ROW

    return seconds
