"""Which models are stateful no longer: those whose every recurrent state is recorded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from npu_patch.patches.gated_delta.patch import is_served_rule
from npu_patch.serving.calls import Calls
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site

NAME = "_is_stateful"
UPDATE = "update_recurrent_state"  # of a cache, by which a layer is known that has a state
NO_STATE = "no layer with a recurrent state that is known"


def find(module: ModuleType) -> Iterator[Site]:
    """Classes that call themselves stateful and whose module has layers with a recurrent state."""
    classes = [each for each in vars(module).values() if _is_of(module, each)]
    if any(_has_state(each) for each in classes):
        yield from (Site(each, NAME, True) for each in classes if vars(each).get(NAME) is True)


def _is_of(module: ModuleType, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == module.__name__


def _has_state(cls: type) -> bool:
    return UPDATE in names_used(vars(cls).get("forward"))


def why_stateful(model: torch.nn.Module, device_type: str) -> str | None:
    """Why drafts cannot be taken back from its states, or None. Those are recorded on devices of one type."""
    layers = [*model.modules()]
    kinds: set[Any] = {*map(type, layers)}
    classes = {cls for cls in kinds if UPDATE in names_used(cls.forward)}
    for layer in layers:
        cls = type(layer)
        if cls in classes and not is_served_rule(layer, sys.modules.get(cls.__module__)):
            return f"{cls.__name__} has a recurrent state that nothing of npu_patch records"
        if cls in classes and (others := {each.device.type for each in layer.parameters()} - {device_type, "meta"}):
            return f"{cls.__name__} is on {', '.join(sorted(others))}: states are recorded on {device_type}"
    return None if classes else NO_STATE


class Stateful:
    """`model._is_stateful`: not, where what was drafted can be taken back. Of a class it is what it was."""

    def __init__(self, calls: Calls, why_not: Callable[[], str | None], device_type: str) -> None:
        self.calls, self.why_not, self.device_type = calls, why_not, device_type

    def __get__(self, model: Any, cls: type | None = None) -> bool:
        if model is None or not self.calls.active:
            return True
        reason = self.why_not() or why_stateful(model, self.device_type)
        if reason is None:
            self.calls.ran += 1
        else:
            self.calls.fell_through[reason] += 1
        return reason is not None


def is_rolled_back(model: Any) -> bool:
    """Whether it is stateful but for this patch."""
    return bool(getattr(type(model), NAME, False)) and not getattr(model, NAME)
