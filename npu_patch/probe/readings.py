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
PLAIN = frozenset((type(None), bool, int, float, str))
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
        kind = (cls, *configuration.values())
        self.known[kind] = (reading, reading)

    def of(self, module: torch.nn.Module) -> Reading | NotRead:
        cls = type(module)
        names = self.names.get(cls)
        if names is None:  # peft's target_parameters make a new class for every forward
            cls = type_before_parametrizations(module)
            names = self.names.get(cls, self.settings)
        try:
            found = self.known.get(_kind(cls, module, names) if names else (cls,))
        except TypeError:
            return NotRead("its activation cannot be told from another")
        if found is not None:
            return found[module.training]
        if torch.compiler.is_compiling():
            return NotRead("not yet observed, and compiling")
        with asked_for(vars(module)) as asked:
            found = tuple(self.read(cls, attributes_of(module, training)) for training in (False, True))
        settings = (name for name in sorted(asked - {"training"}) if type(getattr(module, name, None)) in PLAIN)
        self.names[cls] = tuple(dict.fromkeys((*names, *settings)))
        self.known[_kind(cls, module, self.names[cls])] = found
        return found[module.training]


def _kind(cls: type, module: torch.nn.Module, names: tuple[str, ...]) -> tuple[Hashable, ...]:
    return cls, *[
        value if type(value) in PLAIN else kind_of(value) for name in names for value in (getattr(module, name, None),)
    ]


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
