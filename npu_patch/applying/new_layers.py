"""Layers that are made while patches are in place: looked at when their parent is given them.

So the first call of a layer need not look: it may be compiled, or run under whatever hooks and modes. A layer that
cannot be looked at yet is looked at when it is called. Modules that were half executed when `apply()` came are looked
through then, too: none of their layers exists before. Layers are counted for the report.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch.nn.modules import module as torch_modules

from npu_patch.numerics.room import in_quiet_room
from npu_patch.sites.late_imports import is_half_executed
from npu_patch.sites.sites import defining_class

REGISTRY = torch_modules._global_module_registration_hooks
KEY = "npu_patch"  # not a number, as the handles of others are


@dataclass(frozen=True)
class HalfExecuted:
    """A module, and what looks through it once it is all there."""

    module: ModuleType
    look_through: Callable[[ModuleType], None]


def watcher(
    patched: Mapping[tuple[int, str], Sequence[Any]],
    registries: Iterable[tuple[int, str]],
    half_executed: Sequence[HalfExecuted],
    layers: MutableMapping[torch.nn.Module, tuple[int, str]],
) -> Callable[..., None]:
    """A hook for all modules. `patched`: what stands at each site (`PatchedSite`), live; `registries`: the keys of
    those that serve layers of any class; `half_executed`: live too, emptied by looking. `layers`: those that the
    outcomes of their class have counted, and that site's key; wrappers register a layer again."""

    def look_at(parent: torch.nn.Module, name: str, layer: torch.nn.Module | None) -> None:
        if layer is None or torch.compiler.is_compiling() or in_quiet_room():
            return
        for each in [each for each in half_executed if not is_half_executed(each.module)]:
            each.look_through(each.module)
        own = (id(defining_class(layer)), "forward")
        if own in patched and layer not in layers:
            layers[layer] = own
            for held in patched[own]:
                held.outcome.made += 1
        sites: tuple[tuple[int, str], ...] = (own, *registries)
        for held in [held for site in sites for held in patched.get(site, ())]:
            if held.replacement.observe is not None:
                with contextlib.suppress(Exception):
                    held.replacement.observe(layer)

    return look_at
