"""Compares alternatives of an op at the shapes a model has: is each correct, how long does it take, which is taken.

    found = measure(case, Alternative("triton", run), device, stopwatch(device))

An alternative is checked first, against the case's definition in float64 on a few tokens, outputs and gradients; one
that is wrong is not timed and never taken. The times are medians, forward and backward together, of a few
milliseconds altogether beside what a kernel's first run compiles. Operators of the vendor, which nobody times here, are
checked in the same way (`check`): that a site's original computes something says nothing of this device's operator.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from npu_patch.measuring.in_turns import seconds
from npu_patch.numerics.closeness import difference
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import numbers, values
from npu_patch.serving.case import ACCIDENTS, FEW_TOKENS, OUT_OF_MEMORY, Alternative, AnyCase, Measured, Stopwatch

# Of the largest input that is timed: 4096 tokens of a model 4096 wide, in 32 heads.
ELEMENTS, MOST_ROWS = 2**24, 2**17
WARM_UPS, RUNS, IN_A_ROW = 3, 7, 4
ENOUGH_S = 0.5  # of one alternative: fewer runs where they take that long
GRADIENTS = 4.0  # times ALLOWED: a gradient passes through several roundings


def measure(case: AnyCase, alternative: Alternative, device: torch.device, stopwatch: Stopwatch) -> Measured:
    """Checks, then times. An alternative that raises is a wrong one."""
    found = check(case, alternative, device)
    if found.wrong is not None:
        return found
    return _apart(lambda: Measured(seconds=_median_time(case, alternative, device, stopwatch)), device)


def check(case: AnyCase, alternative: Alternative, device: torch.device) -> Measured:
    """Whether it is right, without a time."""
    return _apart(lambda: Measured(why_wrong(case, alternative, device)), device)


def _apart(find: Callable[[], Measured], device: torch.device) -> Measured:
    """Apart from whatever the caller is in the middle of. What raises is wrong, accidents aside."""
    try:
        with quiet_room(), torch.autocast(device.type, enabled=False):
            return find()
    except torch.OutOfMemoryError:
        return Measured(OUT_OF_MEMORY)
    except Exception as error:
        return Measured(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def answers(device: torch.device) -> bool:
    """Whether the device still computes: an operator that faults may take it along."""
    try:
        with quiet_room():
            return float((values((2,), 1).to(device) * 0.0).sum().cpu()) == 0.0
    except Exception:
        return False


def faster(alternatives: Sequence[tuple[str, Measured]], incumbent: Measured) -> str | None:
    """The name of the fastest correct alternative if it beats the incumbent, as it does a wrong one; else None."""
    timed = [(measured.seconds, name) for name, measured in alternatives if measured.seconds is not None]
    if not timed or incumbent.wrong in ACCIDENTS:
        return None
    beaten = incumbent.wrong is not None or (incumbent.seconds is not None and min(timed)[0] < incumbent.seconds)
    return min(timed)[1] if beaten else None


def why_wrong(case: AnyCase, alternative: Alternative, device: torch.device) -> str | None:
    """How far outputs and gradients on a few tokens are from the definition in float64, if too far."""
    for tokens in case.tokens:
        reason = _why_wrong(case, alternative, device, tokens)
        if reason is not None:
            return reason if tokens == FEW_TOKENS else f"{reason}, at a length of {tokens}"
    return None


def _why_wrong(case: AnyCase, alternative: Alternative, device: torch.device, tokens: int) -> str | None:
    kinds = case.inputs(tokens)
    given = [numbers(shape, 10 + index, dtype) for index, (shape, dtype) in enumerate(kinds)]
    leaves = [each.to(device).requires_grad_(case.differentiated) for each in given]
    exact_leaves = [each.double().requires_grad_(case.differentiated) for each in given]
    with torch.set_grad_enabled(case.differentiated):
        if alternative.unsupported is not None and case.call(alternative.unsupported, *leaves) is not None:
            return None  # the model's call does not reach it either
        outputs = _tensors(case.call(alternative.run, *leaves))
        exact = _tensors(case.definition(*exact_leaves))
    half = [dtype for _, dtype in kinds if dtype != torch.float32]
    allowed = case.allowed[half[0] if half else torch.float32]
    names = ["the output"] if len(exact) == 1 else [f"output {index}" for index in range(len(exact))]
    results = [(*each, allowed) for each in zip(names, outputs, exact, strict=True)]
    if case.differentiated:
        weights = [numbers(each.shape, 90 + index, outputs[index].dtype) for index, each in enumerate(exact)]
        found = torch.autograd.grad(outputs, leaves, [each.to(device) for each in weights])
        exact_found = torch.autograd.grad(exact, exact_leaves, [each.double() for each in weights])
        for index, (one, other) in enumerate(zip(found, exact_found, strict=True)):
            results.append((f"the gradient of input {index}", one, other, GRADIENTS * allowed))
    for name, one, other, bar in results:
        far = difference(one.detach().cpu().double(), other.detach())
        if not far <= bar:
            return f"self-check: {name} is {far:.2g} of its size off"
    return None


def _tensors(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return (result,) if isinstance(result, Tensor) else result


def _median_time(case: AnyCase, alternative: Alternative, device: torch.device, stopwatch: Stopwatch) -> float:
    kinds = case.inputs(_timed_tokens(case))
    leaves = [torch.ones(shape, dtype=dtype, device=device).requires_grad_() for shape, dtype in kinds]
    gradients = [torch.ones_like(each) for each in _tensors(case.call(alternative.run, *leaves))]

    def forward_and_backward() -> None:
        torch.autograd.grad(_tensors(case.call(alternative.run, *leaves)), leaves, gradients)

    forward_and_backward()  # compiles, if it is a kernel that must be
    enough = time.perf_counter() + ENOUGH_S
    for _ in range(WARM_UPS - 1):
        forward_and_backward()
    found = [stopwatch(forward_and_backward)]
    while len(found) < RUNS and time.perf_counter() < enough:
        found.append(stopwatch(forward_and_backward))
    return statistics.median(found)


def _timed_tokens(case: AnyCase) -> int:
    """As many as a large call of a model has: ELEMENTS in its largest input, whatever heads a token is made of."""
    if case.timed_tokens is not None:
        return case.timed_tokens
    one, two = ([math.prod(shape) for shape, _ in case.inputs(tokens)] for tokens in (1, 2))
    each = max(more - fewer for more, fewer in zip(two, one, strict=True))
    return max(1, min(ELEMENTS // max(1, each), MOST_ROWS))


def stopwatch(device: torch.device) -> Stopwatch:
    """Seconds that one of several calls in a row takes on `device`: as in training, the host launches the next while
    the device is at one, so that launching counts only where it takes longer."""
    return lambda function: seconds(function, device, IN_A_ROW) / IN_A_ROW
