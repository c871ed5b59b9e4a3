"""What each kind of experts layer computes, observed once per kind.

A kind is a class and the settings of the instance at hand: its numbers, flags and names, and its activation. A limit or
a flag that somebody changes on a live layer makes it another kind. Whether it is training is no part of its kind: both
ways are observed at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.nn.utils.parametrize import type_before_parametrizations

from npu_patch.numerics.findings import Findings

Reading = TypeVar("Reading")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a torch.nn.Module


@dataclass
class Kinds(Generic[Reading]):
    """`read(cls, attributes)` observes a new kind: a reading, or in words why there is none."""

    read: Callable[[type, Mapping[str, Any]], Reading | str]
    known: Findings = field(default_factory=Findings)  # by kind: what it computes (not training, training)

    def of(self, module: torch.nn.Module) -> Reading | str:
        # peft's target_parameters make a new class for every forward.
        cls = type_before_parametrizations(module)
        try:
            kind = (cls, _settings(module), activation_kind(getattr(module, "act_fn", None)))
            if kind in self.known:
                return self.known[kind][module.training]
        except TypeError:
            return "its activation cannot be told from another"
        if torch.compiler.is_compiling():
            return "not yet observed, and compiling"
        self.known[kind] = tuple(self.read(cls, attributes_of(module, training)) for training in (False, True))
        return self.known[kind][module.training]


def attributes_of(module: torch.nn.Module, training: bool) -> dict[str, Any]:
    """What an instance owns, its modules included and its tensors not, as if it were training or not."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    children = {name: in_mode(child, training) for name, child in module.named_children()}
    return own | children | {"training": training}


def in_mode(module: Any, training: bool) -> Any:
    """A module as if it were training or not, its modules included; the live one stays what it is. Without hooks and
    forwards of its own, which are for the model's calls."""
    if not isinstance(module, torch.nn.Module):
        return module
    copied = object.__new__(type(module))
    children = {name: in_mode(child, training) for name, child in module._modules.items()}
    vars(copied).update(vars(module), training=training, _modules=children)
    vars(copied).update({name: OrderedDict() for name in HOOKS})
    vars(copied).pop("forward", None)
    return copied


def _settings(module: torch.nn.Module) -> tuple[tuple[str, Any], ...]:
    """Private ones are shown to no probe: transformers notes there that it has initialised a layer."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if name != "training" and name[0] != "_" and (value is None or type(value) in (bool, int, float, str))
    )


def activation_kind(activation: Any) -> Hashable:
    """Two activations of one kind compute the same. Raises `TypeError`, when hashed, where that cannot be told."""
    if not isinstance(activation, torch.nn.Module):
        return activation
    own = tuple((key, value) for key, value in vars(activation).items() if key != "training" and key[0] != "_")
    return type(activation), own, tuple((name, activation_kind(child)) for name, child in activation._modules.items())
