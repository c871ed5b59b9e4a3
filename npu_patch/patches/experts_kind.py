"""What each kind of experts layer computes, observed once per kind.

A kind is a class and the settings of the instance at hand: its numbers, flags and names, and its activation. A limit or
a flag that somebody changes on a live layer makes it another kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.nn.utils.parametrize import type_before_parametrizations

Reading = TypeVar("Reading")


@dataclass
class Kinds(Generic[Reading]):
    """`read(cls, attributes)` observes a new kind: a reading, or in words why there is none."""

    read: Callable[[type, Mapping[str, Any]], Reading | str]
    known: dict[Hashable, Reading | str] = field(default_factory=dict)

    def of(self, module: torch.nn.Module) -> Reading | str:
        # peft's target_parameters make a new class for every forward.
        cls = type_before_parametrizations(module)
        try:
            kind = (cls, _settings(module), _activation(module))
            if kind in self.known:
                return self.known[kind]
        except TypeError:
            return "its activation cannot be told from another"
        if torch.compiler.is_compiling():
            return "not yet observed, and compiling"
        self.known[kind] = self.read(cls, attributes_of(module))
        return self.known[kind]


def attributes_of(module: torch.nn.Module) -> dict[str, Any]:
    """What an instance owns, its modules included and its tensors not."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    return own | dict(module.named_children())


def _settings(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    return tuple(
        (name, value) for name, value in vars(module).items() if value is None or type(value) in (bool, int, float, str)
    )


def _activation(module: torch.nn.Module) -> Hashable:
    activation = getattr(module, "act_fn", None)
    if isinstance(activation, torch.nn.Module):
        return type(activation), _settings(activation)
    return activation
