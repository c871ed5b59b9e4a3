"""Layers that keep a forward or a function of their own are bound to the replacement too, or reported."""

from __future__ import annotations

from types import MethodType, ModuleType

import torch

from npu_patch.applying.patched_site import own_forwards
from npu_patch.applying.state import STATE
from npu_patch.reporting.outcome import SKIPPED, Outcome
from npu_patch.sites.sites import kept_functions
from npu_patch.sites.whose import whose


def reach(model: torch.nn.Module) -> list[Outcome]:
    """Binds the layers of `model` that can be reached; of the others, what they keep."""
    _bind_kept_functions(model)
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


def _bind_kept_functions(model: torch.nn.Module) -> None:
    functions = {
        id(stack[0].site.original): stack[-1].replacement.function
        for stack in STATE.patched.values()
        if isinstance(stack[0].site.owner, ModuleType)
    }
    for module in model.modules():
        for owner, name, kept in list(kept_functions(module)):
            if id(kept) in functions:
                STATE.journal.rebind(owner, name, functions[id(kept)])
