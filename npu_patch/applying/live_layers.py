"""Layers that keep a forward of their own are bound to the replacement too, or reported."""

from __future__ import annotations

from types import MethodType, ModuleType

import torch

from npu_patch.applying.binding import pickle_as_bound
from npu_patch.applying.patched_site import own_forwards
from npu_patch.applying.state import STATE
from npu_patch.reporting.outcome import SKIPPED, Outcome
from npu_patch.sites.pickling import keeps_functions
from npu_patch.sites.whose import whose


def reach(model: torch.nn.Module) -> list[Outcome]:
    """Binds the layers of `model` that can be reached, and says which can not."""
    _pickle_as_bound(model)
    unreached: dict[tuple[str, str, str], list[torch.nn.Module]] = {}
    for module, stack, bound in own_forwards(model, STATE.patched):
        function = stack[-1].replacement.function
        if bound.reachable:
            if getattr(bound.bound, "__func__", bound.bound) is not function:
                in_its_place = MethodType(function, module) if isinstance(bound.bound, MethodType) else function
                STATE.journal.rebind(bound.owner, bound.name, in_its_place)
            continue
        STATE.unreached.add(module)
        for held in stack:
            unreached.setdefault((held.outcome.patch, held.site.label, whose(bound.bound)), []).append(module)
            held.outcome.layers = (held.outcome.layers or 1) - 1
    return [
        Outcome(
            patch,
            label,
            SKIPPED,
            f"live layers whose own forward is {name}, which hides the class's",
            layers=len(modules),
        )
        for (patch, label, name), modules in unreached.items()
    ]


def _pickle_as_bound(model: torch.nn.Module) -> None:
    """Layers that keep functions in ways that their class does not show."""
    functions = [
        stack[0].site.original for stack in STATE.patched.values() if isinstance(stack[0].site.owner, ModuleType)
    ]
    for cls in {type(layer) for layer in model.modules() if keeps_functions(layer, functions)}:
        pickle_as_bound(cls)
