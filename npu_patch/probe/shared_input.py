"""Which parts of a layer are given one tensor, one after the other: q, k and v, or gate and up.

The layer's forward runs on a stand-in whose modules are recorders. How far it comes does not matter: what was called
until then was called. Nothing depends on it but what is computed together: a forward that does otherwise another time
computes something twice, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import numbers
from npu_patch.probe.stand_in import Missing, StandIn

SHAPE = (2, 3)  # batch and tokens
Widths = tuple[tuple[str, int, int], ...]  # by the part's name: in, out


def read_shared_inputs(
    cls: type, forward: Callable[..., Any], attributes: Mapping[str, Any], modules: Mapping[str, Any], widths: Widths
) -> tuple[tuple[str, ...], ...]:
    """In the order of the calls, each group of the parts in `widths`. `attributes` of the instance that are no modules,
    `modules` that are."""
    settings = tuple(sorted((name, value) for name, value in attributes.items() if type(value) in (bool, int)))
    return _read(cls, forward, tuple(each for each in settings if each[0] != "layer_idx"), tuple(modules), widths)


@remembered
def _read(
    cls: type,
    forward: Callable[..., Any],
    settings: tuple[tuple[str, Any], ...],
    modules: tuple[str, ...],
    widths: Widths,
) -> tuple[tuple[str, ...], ...]:
    calls: list[tuple[str, Tensor, int]] = []
    wide = {name: (wide_in, wide_out) for name, wide_in, wide_out in widths}

    def recorder(name: str) -> Callable[..., Any]:
        def record(given: Any, *args: Any, **kwargs: Any) -> Any:
            if name not in wide:
                return given
            calls.append((name, given, given._version))
            return numbers((*given.shape[:-1], wide[name][1]), 20 + len(calls), given.dtype)

        return record

    with quiet_room():
        given: list[Any] = [numbers((*SHAPE, widths[0][1]), 19, torch.float32)]
        parameters = list(inspect.signature(forward).parameters.values())[2:]
        given += [None for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
        try:
            forward(StandIn(cls, dict(settings) | {name: recorder(name) for name in modules}), *given)
        except (Missing, Exception) as problem:
            unless_accident(problem)
    return _groups(calls)


def _groups(calls: list[tuple[str, Tensor, int]]) -> tuple[tuple[str, ...], ...]:
    groups: list[list[str]] = []
    for index, (name, given, version) in enumerate(calls):
        before = calls[index - 1] if index else None
        if before is not None and before[1] is given and before[2] == version:
            groups[-1].append(name)
        else:
            groups.append([name])
    return tuple(tuple(group) for group in groups if len(set(group)) == len(group) > 1)
