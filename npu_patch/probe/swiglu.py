"""Whether a feed-forward module computes SwiGLU through its own projections, and which attribute plays which part.

The forward runs on a stand-in whose unknown attributes are recorders: each is called like a module, remembers what
it was given, and answers with fresh random numbers. Which recorder saw the input, whose answer another one saw, and
that the last one was given exactly `activation(gate) * up`, shows the parts without naming or building any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import difference, distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import NotRead
from npu_patch.probe.stand_in import Missing, StandIn, problem_text

# Of what the projections answer: limits that somebody sets lie far from 1.
SCALES = (1.0, 100.0, 1e4)
SHAPE = (3, 5, 6)


@dataclass(frozen=True)
class SwiGLUReading:
    """`down(activation(gate(x)) * up(x))`, or with `up` None `down(activation(first half) * second half)` of `gate(x)`.

    Each is an attribute's name. `activation` None means that the forward itself applies SiLU; otherwise the attribute
    of each instance has to be looked at: `computes_silu`.
    """

    gate: str
    up: str | None
    activation: str | None
    down: str

    @property
    def name(self) -> str:
        return "gate and up" if self.up else "gate_up in one"


@dataclass(frozen=True)
class Call:
    name: str
    given: Tensor
    answered: Tensor


def read_swiglu(cls: type, forward: Callable[..., Any]) -> SwiGLUReading | NotRead:
    """Runs `forward(self, x)` on a stand-in for an instance of `cls`."""
    with quiet_room():
        for dtype, training, scale in product((torch.float32, torch.bfloat16), (True, False), SCALES):
            reading = _read(cls, forward, dtype, training, scale)
            if isinstance(reading, NotRead):
                break
        return reading


def computes_silu(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether an activation is SiLU on CPU tensors, forward and backward. Of a module it is the forward, so that hooks
    hear nothing of it; one with tensors of its own may be another tomorrow."""
    if isinstance(activation, torch.nn.Module):
        if any(True for tensors in (activation.parameters(), activation.buffers()) for _ in tensors):
            return False
        activation = activation.forward
    with quiet_room():
        observed_input, expected_input = values(SHAPE, 30, grad=True), values(SHAPE, 30, grad=True)
        try:
            observed = activation(observed_input)
        except Exception as error:
            unless_accident(error)
            return False
        return distance([observed], [F.silu(expected_input)], [observed_input], [expected_input]) <= 1.0


def _read(
    cls: type, forward: Callable[..., Any], dtype: torch.dtype, training: bool, scale: float
) -> SwiGLUReading | NotRead:
    calls: list[Call] = []
    x = values(SHAPE, 31, dtype, grad=True)

    def recorder(name: str) -> Callable[[Tensor], Tensor]:
        def record(given: Tensor) -> Tensor:
            numbers = values(given.shape, 40 + len(calls)) * scale
            answered = numbers.to(given.dtype).requires_grad_()
            calls.append(Call(name, given, answered))
            return answered

        return record

    try:
        returned = forward(StandIn(cls, {"training": training}, recorder), x)
    except (Missing, Exception) as problem:
        unless_accident(problem)
        on_input = [call for call in calls if call.given is x]
        return NotRead(
            f"its forward does more than call its parts ({problem_text(problem)})", notable=len(on_input) > 1
        )
    return _parts(x, calls, returned)


def _parts(x: Tensor, calls: list[Call], returned: Any) -> SwiGLUReading | NotRead:
    on_input = [call for call in calls if call.given is x]
    if not on_input or calls[-1].answered is not returned:
        return NotRead("its result is not the answer of a projection", notable=len(on_input) > 1)
    down = calls[-1]
    between = [call for call in calls if call.given is not x and call is not down]
    if len(on_input) == 2 and len(between) <= 1:
        return _separate(on_input, between, down)
    if len(on_input) == 1 and len(between) <= 1 and down is not on_input[0]:
        return _fused(on_input[0], between, down)
    return NotRead(f"it calls {len(calls)} parts, SwiGLU has 3 or 4", notable=len(on_input) > 1)


def _separate(on_input: list[Call], between: list[Call], down: Call) -> SwiGLUReading | NotRead:
    for gate, up in (on_input, on_input[::-1]):
        if not between and _is(down.given, _gated, gate.answered, up.answered):
            return SwiGLUReading(gate.name, up.name, None, down.name)
        activated = between and between[0].given is gate.answered
        if activated and _is(down.given, torch.mul, between[0].answered, up.answered):
            return SwiGLUReading(gate.name, up.name, between[0].name, down.name)
    gated = any(_scales_with(down.given, call.answered) for call in on_input)
    return NotRead("its last projection is not given activation(gate) * up", notable=gated)


def _fused(gate_up: Call, between: list[Call], down: Call) -> SwiGLUReading | NotRead:
    halves = gate_up.answered.chunk(2, -1)
    activation = between[0].name if between else None
    for gate, up in ((0, 1), (1, 0)):

        def of_silu(both: Tensor, gate: int = gate, up: int = up) -> Tensor:
            return _gated(both.chunk(2, -1)[gate], both.chunk(2, -1)[up])

        def after_activation(activated: Tensor, both: Tensor, up: int = up) -> Tensor:
            return activated * both.chunk(2, -1)[up]

        if activation is None:
            found = _is(down.given, of_silu, gate_up.answered)
        else:
            found = difference(between[0].given, halves[gate].detach()) == 0.0
            found = found and _is(down.given, after_activation, between[0].answered, gate_up.answered)
        if found and gate == 1:
            return NotRead("it activates the second half, npu_swiglu the first", notable=True)
        if found:
            return SwiGLUReading(gate_up.name, None, activation, down.name)
    gated = bool(between) and between[0].given.shape == halves[0].shape
    return NotRead("its last projection is not given activation(first half) * second half", notable=gated)


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _is(result: Tensor, formula: Callable[..., Tensor], *inputs: Tensor) -> bool:
    """Whether `result` is formula(*inputs), forward and backward."""
    expected_inputs = [tensor.detach().clone().requires_grad_(True) for tensor in inputs]
    return distance([result], [formula(*expected_inputs)], inputs, expected_inputs) <= 1.0


def _scales_with(result: Tensor, factor: Tensor) -> bool:
    """Whether `result` is linear in `factor` without an offset: a product, not a sum of branches."""
    if result.shape != factor.shape or not result.requires_grad:
        return False
    (slope,) = torch.autograd.grad(result.sum(), factor, retain_graph=True, allow_unused=True)
    return slope is not None and difference((slope * factor).to(result.dtype), result.detach()) < 2.0**-6
