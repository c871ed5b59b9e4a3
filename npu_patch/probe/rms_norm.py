"""Which RMSNorm variant a module's forward computes, and which of its attributes are the weight and the eps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from npu_patch.kernels.gamma import NONE
from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import NotRead, RMSNormReading
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS, RMSNormVariant
from npu_patch.probe.stand_in import Missing, StandIn

WEIGHT, EPS = object(), object()  # what an attribute may stand for; each case puts its own value there
EPS_VALUE = 0.03  # large enough that a forward that ignores it is far from every variant
# Of what is normalized: limits that somebody sets lie far from 1.
SCALES = (1.0, 1e3, 1e-2)
SHAPE = (3, 5, 6)
DTYPE_PAIRS = (  # of input and weight: a variant is also the dtype that it returns when the two differ
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
)
MOST_ATTRIBUTES = 5
MOST_RUNS = 150  # an RMSNorm needs at most about 50; this bounds what a large forward costs
Choices = tuple[tuple[Any, ...], ...]  # in order; later alternatives only where the earlier ones lead nowhere


def read_rms_norm(
    cls: type, forward: Callable[..., Any], gated: bool, attributes: Mapping[str, Any] | None = None
) -> Sequence[RMSNormReading] | NotRead:
    """Calls `forward(self, x)`, or with `gated` `forward(self, x, gate)`, on stand-ins for instances of `cls`.

    `attributes` are those of a live instance. Without them every attribute may be a weight, an eps, a flag or the
    name of an activation, and each assignment that computes a variant is a reading of its own: one at least.
    """
    variants = GATED_VARIANTS if gated else PLAIN_VARIANTS
    choices = _choices_without_instance if attributes is None else functools.partial(_choices_of_instance, attributes)
    with quiet_room():
        return _read(cls, forward, variants, choices)


def _choices_without_instance(name: str) -> Choices:
    # A name that may be a weight is no flag, and a flag that may be True is no name of an activation.
    return ((WEIGHT,), (EPS,), (True, False, None), ("silu", "sigmoid"))


def _choices_of_instance(attributes: Mapping[str, Any], name: str) -> Choices:
    if name not in attributes or isinstance(value := attributes[name], torch.nn.Module):
        return ()
    if isinstance(value, Tensor):
        return ((WEIGHT,),)
    return ((EPS,), (value,)) if isinstance(value, float) else ((value,),)


def _read(
    cls: type,
    forward: Callable[..., Any],
    variants: Sequence[RMSNormVariant],
    choices: Callable[[str], Choices],
) -> Sequence[RMSNormReading] | NotRead:
    gated = variants[0].gate is not None
    readings: list[RMSNormReading] = []
    nearest, nearest_distance = "", float("inf")
    search = _Search(cls, forward, gated, choices)
    for assignment in search.complete_assignments({}):
        weights = [name for name, value in assignment.items() if value is WEIGHT]
        epsilons = [name for name, value in assignment.items() if value is EPS]
        if not epsilons:
            continue
        configuration = {name: value for name, value in assignment.items() if value is not WEIGHT and value is not EPS}
        for variant in variants:
            if (variant.gamma == NONE) == bool(weights):
                continue
            far = _distance(cls, forward, variant, assignment)
            if far <= 1.0:
                readings.append(RMSNormReading(variant, weights[0] if weights else None, epsilons[0], configuration))
                break
            if far <= nearest_distance:
                nearest, nearest_distance = variant.name, far
    why_none = _why_none(nearest, nearest_distance, search.stuck_at)
    return readings or NotRead(why_none, notable="rmsnorm" in cls.__name__.lower())


def _why_none(nearest: str, nearest_distance: float, stuck_at: str) -> str:
    if not nearest:
        asked = f" (it asks for {stuck_at!r})" if stuck_at else ""
        return f"its forward needs more than an input, a weight, an eps and flags{asked}"
    if nearest_distance == float("inf"):
        return f"computes no known RMSNorm: shape, dtype or gradients differ from {nearest!r}"
    return f"computes no known RMSNorm: nearest is {nearest!r}, {nearest_distance:.3g} tolerances away"


class _Search:
    """What the attributes may be, at most one weight and one eps among them, for the forward to run to its end."""

    def __init__(self, cls: type, forward: Callable[..., Any], gated: bool, choices: Callable[[str], Choices]) -> None:
        self.cls, self.forward, self.choices = cls, forward, choices
        self.inputs = _inputs(torch.float32, torch.float32, gated)
        self.runs = 0
        self.stuck_at = ""

    def complete_assignments(self, assignment: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.runs == MOST_RUNS or len(assignment) > MOST_ATTRIBUTES:
            return
        self.runs += 1
        try:
            _call(self.cls, self.forward, assignment, *self.inputs)
        except Missing as missing:
            yield from self._with(missing.name, assignment)
        except Exception as error:  # this assignment makes no sense to the forward
            unless_accident(error)
            return
        else:
            yield assignment

    def _with(self, name: str, assignment: dict[str, Any]) -> Iterator[dict[str, Any]]:
        settled = False
        for alternatives in self.choices(name):
            if settled and alternatives != (EPS,):
                return
            for value in alternatives:
                if any(value is once and once in assignment.values() for once in (WEIGHT, EPS)):
                    continue
                for complete in self.complete_assignments(assignment | {name: value}):
                    settled = settled or value is not EPS
                    yield complete
        if not settled:
            self.stuck_at = name


def _distance(cls: type, forward: Callable[..., Any], variant: RMSNormVariant, assignment: Mapping[str, Any]) -> float:
    worst = 0.0
    has_weight, gated = variant.gamma != NONE, variant.gate is not None
    for (input_dtype, weight_dtype), scale in product(DTYPE_PAIRS if has_weight else DTYPE_PAIRS[:2], SCALES):
        observed_inputs = _inputs(input_dtype, weight_dtype, gated, scale)
        expected_inputs = _inputs(input_dtype, weight_dtype, gated, scale)
        try:
            observed = _call(cls, forward, assignment, *observed_inputs)
        except Exception as error:
            unless_accident(error)
            return float("inf")
        x, weight, *gate = expected_inputs
        expected = variant.reference(x, weight if has_weight else None, EPS_VALUE, *gate)
        if not has_weight:
            del observed_inputs[1], expected_inputs[1]
        worst = max(worst, distance([observed], [expected], observed_inputs, expected_inputs))
        if worst > 1.0:
            break
    return worst


def _inputs(input_dtype: torch.dtype, weight_dtype: torch.dtype, gated: bool, scale: float = 1.0) -> list[Tensor]:
    x = (values(SHAPE, 1) * scale).to(input_dtype).requires_grad_()
    weight = values(SHAPE[-1:], 2, weight_dtype, grad=True)
    return [x, weight, values(SHAPE, 3, input_dtype, grad=True)] if gated else [x, weight]


def _call(
    cls: type, forward: Callable[..., Any], assignment: Mapping[str, Any], x: Tensor, weight: Tensor, *gate: Tensor
) -> Any:
    put = {id(WEIGHT): weight, id(EPS): EPS_VALUE}
    attributes = {name: put.get(id(value), value) for name, value in assignment.items()}
    return forward(StandIn(cls, attributes), x, *gate)
