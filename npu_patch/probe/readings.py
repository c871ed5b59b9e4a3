"""What each kind of instance of a patched class computes, observed once per kind.

A kind is a class with the values of the settings that its code was observed to ask for. A limit or a flag that somebody
changes on a live layer makes it another kind. Whether it is training is no part of its kind: both ways are observed at
once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.nn.utils.parametrize import type_before_parametrizations

from npu_patch.numerics.findings import Findings
from npu_patch.ops.readings import NotRead
from npu_patch.probe.stand_in import asked_for

Reading = TypeVar("Reading")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")  # of a torch.nn.Module


@dataclass
class Readings(Generic[Reading]):
    """`read(cls, attributes)` observes a new kind; `settings` are what it looks at itself, beside the observed code."""

    read: Callable[[type, Mapping[str, Any]], Reading | NotRead]
    settings: tuple[str, ...] = ()
    names: Findings = field(default_factory=Findings)  # by class: the settings that make a kind
    known: Findings = field(default_factory=Findings)  # by kind: what it computes (not training, training)

    def note(self, cls: type, reading: Reading, configuration: Mapping[str, Any]) -> None:
        """What was read of the class itself, of instances with this `configuration`."""
        self.names[cls] = tuple(configuration)
        self.known[(cls, *configuration.values())] = (reading, reading)

    def of(self, module: torch.nn.Module) -> Reading | NotRead:
        cls = type(module)
        if cls not in self.names:  # peft's target_parameters make a new class for every forward
            cls = type_before_parametrizations(module)
        try:
            kind = self._kind(cls, module)
            if kind in self.known:
                return self.known[kind][module.training]
        except TypeError:
            return NotRead("its activation cannot be told from another")
        if torch.compiler.is_compiling():
            return NotRead("not yet observed, and compiling")
        with asked_for(vars(module)) as asked:
            found = tuple(self.read(cls, attributes_of(module, training)) for training in (False, True))
        settings = (name for name in sorted(asked - {"training"}) if _is_plain(getattr(module, name, None)))
        self.names[cls] = tuple(dict.fromkeys((*self.names.get(cls, self.settings), *settings)))
        self.known[self._kind(cls, module)] = found
        return found[module.training]

    def _kind(self, cls: type, module: torch.nn.Module) -> tuple[Hashable, ...]:
        return cls, *[kind_of(getattr(module, name, None)) for name in self.names.get(cls, self.settings)]


def attributes_of(module: torch.nn.Module, training: bool) -> dict[str, Any]:
    """What an instance owns, as if it were training or not. Private attributes are shown to no probe: transformers
    notes there that it has initialised a layer."""
    own = {name: value for name, value in vars(module).items() if not name.startswith("_")}
    children = {name: in_mode(child, training) for name, child in module.named_children()}
    return own | dict(module.named_parameters(recurse=False)) | children | {"training": training}


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


def kind_of(setting: Any) -> Hashable:
    """Two settings, or activations, of one kind do the same. Raises `TypeError`, when hashed, where that cannot be
    told."""
    if not isinstance(setting, torch.nn.Module):
        return setting
    own = tuple((key, value) for key, value in vars(setting).items() if key != "training" and key[0] != "_")
    return type(setting), own, tuple((name, kind_of(child)) for name, child in setting._modules.items())


def _is_plain(value: Any) -> bool:
    return value is None or type(value) in (bool, int, float, str)
