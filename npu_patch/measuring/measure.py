"""Compares alternatives of an op at the shapes a model has: is each correct, how long does it take, which is taken.

    checked = check(case, alternative, device)
    timed = times(case, right_ones, device, clock(device))

An alternative is checked first, against the case's definition in float64 on a few tokens, outputs and gradients; one
that is wrong is not timed and never taken. The times are taken in turns, forward and backward together, some tens of
milliseconds beside what a kernel's first run compiles. Operators of the vendor, which nobody times here, are checked in
the same way: that a site's original computes something says nothing of this device's operator.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from npu_patch.measuring.in_turns import in_turns
from npu_patch.numerics.closeness import difference
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import numbers, values
from npu_patch.serving.case import ACCIDENTS, FEW_TOKENS, OUT_OF_MEMORY, Alternative, AnyCase, Clock, Measured

# Of the largest input that is timed: 4096 tokens of a model 4096 wide, in 32 heads.
ELEMENTS, MOST_ROWS = 2**24, 2**17
SAMPLES = 7
ENOUGH_S = 0.5  # for the samples of one alternative: fewer where they take that long
GRADIENTS = 4.0  # times ALLOWED: a gradient passes through several roundings
Found = TypeVar("Found")


def check(case: AnyCase, alternative: Alternative, device: torch.device) -> Measured:
    """Whether it is right, without a time. An alternative that raises is a wrong one."""
    return _apart(lambda: Measured(why_wrong(case, alternative, device)), device)


def times(
    case: AnyCase, alternatives: Sequence[Alternative], device: torch.device, clock: Clock
) -> dict[str, Measured]:
    """Of right alternatives, by name: in turns, or each by itself where one of them cannot go on."""
    found: dict[str, Measured] = {}
    forms: dict[str, Callable[[], object]] = {}
    for each in alternatives:
        form = _apart(partial(_forward_and_backward, case, each, device), device)
        if isinstance(form, Measured):
            found[each.name] = form
        else:
            forms[each.name] = form
    timed = _apart(partial(clock, forms), device) if forms else {}
    if not isinstance(timed, Measured):
        return {**found, **timed}
    for name, form in forms.items():
        alone = _apart(partial(clock, {name: form}), device)
        found[name] = alone if isinstance(alone, Measured) else alone[name]
    return found


def _apart(find: Callable[[], Found], device: torch.device) -> Found | Measured:
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


def fastest(measured: Mapping[str, Measured], incumbent: str) -> str:
    """The right one with the lowest time of those that are clearly faster than the incumbent, or that; any right one is
    better than an incumbent that is wrong."""
    own = measured[incumbent]
    if own.wrong in ACCIDENTS:
        return incumbent
    timed = {name: each.seconds for name, each in measured.items() if each.seconds is not None and name != incumbent}
    better = [name for name in timed if own.wrong is not None or measured[name].clearly_faster_than(own)]
    return min(better, key=timed.__getitem__, default=incumbent)


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


def _forward_and_backward(case: AnyCase, alternative: Alternative, device: torch.device) -> Callable[[], object]:
    """What is timed: the forward alone where there is no other. It ran once: a kernel that must be compiled is."""
    kinds = case.inputs(_timed_tokens(case))
    leaves = [
        torch.ones(shape, dtype=dtype, device=device).requires_grad_(case.differentiated) for shape, dtype in kinds
    ]
    if not case.differentiated:
        forward = partial(case.call, alternative.run, *leaves)
        forward()
        return forward
    gradients = [torch.ones_like(each) for each in _tensors(case.call(alternative.run, *leaves))]

    def run() -> None:
        torch.autograd.grad(_tensors(case.call(alternative.run, *leaves)), leaves, gradients)

    run()
    return run


def _timed_tokens(case: AnyCase) -> int:
    """As many as a large call of a model has: ELEMENTS in its largest input, whatever heads a token is made of."""
    if case.timed_tokens is not None:
        return case.timed_tokens
    one, two = ([math.prod(shape) for shape, _ in case.inputs(tokens)] for tokens in (1, 2))
    each = max(more - fewer for more, fewer in zip(two, one, strict=True))
    return max(1, min(ELEMENTS // max(1, each), MOST_ROWS))


def clock(device: torch.device) -> Clock:
    """Several calls in a row on `device`, as in training: the host launches the next while the device is at one, so
    that launching counts only where it takes longer. No peaks of memory: `apply` leaves the device's record alone."""

    def take(forms: Mapping[str, Callable[[], object]]) -> dict[str, Measured]:
        enough = ENOUGH_S * len(forms)
        timings = in_turns(forms, device, samples=SAMPLES, peaks=False, enough=enough)
        return {name: timing.measured() for name, timing in timings.items()}

    return take
