"""Adapted layers that are given one input are computed when the first of them is called.

Their results wait until each is asked for with that very input, unchanged, and with the weights and settings that it
was computed with; what is asked for otherwise is computed then. So it does not matter whether they are asked for.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module

from npu_patch.ops.lora.adapted_linear import Adapter
from npu_patch.probe.shared_input import read_shared_inputs
from npu_patch.serving.changed_later import CALLS_OF_MODULES
from npu_patch.sites.sites import innermost

LayerCall = tuple[Tensor, Tensor, "Tensor | None", Adapter]


class Waiting(NamedTuple):
    """The result of a layer's call that has not come yet. `versions`: of the tensors of that call; `leader`: the layer
    that was called first."""

    leader: Module
    call: LayerCall
    versions: tuple[int, ...]
    with_gradients: bool
    result: Tensor


class _OfThread(threading.local):
    def __init__(self) -> None:
        self.waiting: dict[Module, Waiting] = {}


@dataclass
class Groups:
    """Of the layers of class `cls`. `following`: those that a layer's parent calls after it with the same input, by its
    names for them."""

    cls: type[Module]
    following: weakref.WeakKeyDictionary[Module, tuple[Any, tuple[str, ...]]] = field(
        default_factory=weakref.WeakKeyDictionary
    )
    of_thread: _OfThread = field(default_factory=_OfThread)

    def ready(self, layer: Module, call: LayerCall) -> Tensor | None:
        """The result of a call, where it waits."""
        waiting = self.of_thread.waiting
        if not waiting:
            return None
        found = waiting.pop(layer, None)
        if found is None:
            return None
        if found.call[0] is not call[0]:  # cross attention: k and v are given something else than q, and will be again
            self.following[found.leader] = None, ()
            waiting.clear()
            return None
        same = all(one is other for one, other in zip(_tensors(found.call), _tensors(call), strict=True))
        if not same or found.versions != _versions(call) or found.call[3][2:] != call[3][2:]:
            return None
        return found.result if found.with_gradients == torch.is_grad_enabled() else None

    def after(self, layer: Module) -> Iterator[Module]:
        """The layers that will be called with the same input, as they stand now."""
        try:
            parent, names = self.following[layer]
        except KeyError:
            parent, names = self.following[layer] = self._read(layer)
        owner = parent() if names else None
        if owner is not None:
            modules = owner._modules
            for name in names:
                other = modules.get(name)
                if type(other) is self.cls:
                    yield other

    def wait(self, leader: Module, calls: Mapping[Module, LayerCall], results: Sequence[Tensor]) -> None:
        """In place of what still waits, for which nobody has asked."""
        enabled = torch.is_grad_enabled()
        self.of_thread.waiting = {
            layer: Waiting(leader, call, _versions(call), enabled, result)
            for (layer, call), result in zip(calls.items(), results, strict=True)
        }

    def _read(self, layer: Module) -> tuple[Any, tuple[str, ...]]:
        parent = _parent(layer)
        if parent is None:
            return None, ()
        modules = {name: module for name, module in parent._modules.items() if module is not None}
        adapted: dict[str, Any] = {name: module for name, module in modules.items() if type(module) is self.cls}
        if len(adapted) < 2:
            return None, ()
        widths = tuple((name, each.in_features, each.out_features) for name, each in adapted.items())
        own = {name: value for name, value in vars(parent).items() if not name.startswith("_")}
        forward = innermost(type(parent).forward)
        for group in read_shared_inputs(type(parent), forward, own, modules, widths):
            for index, name in enumerate(group):
                if adapted[name] is layer:
                    return weakref.ref(parent), group[index + 1 :] if index == 0 else ()
        return None, ()


def _tensors(call: LayerCall) -> tuple[Tensor | None, ...]:
    x, weight, bias, adapter = call
    return x, weight, bias, adapter.down, adapter.up


def _versions(call: LayerCall) -> tuple[int, ...]:
    return tuple(-1 if each is None or each.is_inference() else each._version for each in _tensors(call))


def _parent(layer: Module) -> Module | None:
    """The module in whose forward `layer` is called now, if it is a part of that."""
    frame: FrameType | None = sys._getframe(1)
    found_own = False
    while frame is not None:
        if frame.f_code is CALLS_OF_MODULES[0]:
            module = frame.f_locals.get("self")
            if found_own:
                children = module._modules.values() if isinstance(module, Module) else ()
                return module if any(each is layer for each in children) else None
            found_own = module is layer
        frame = frame.f_back
    return None
