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
    """The results of calls that have not come yet, with the `versions` of the tensors of each call. `leader`: the layer
    that was called first, with x of that version."""

    leader: Module
    x: Tensor
    version: int
    with_gradients: bool
    results: dict[Module, tuple[LayerCall, list[int], Tensor]]


class _OfThread(threading.local):
    waiting: Waiting | None = None


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
        if waiting is None:
            return None
        found = waiting.results.pop(layer, None)
        if not waiting.results:
            self.of_thread.waiting = None
        if found is None:
            return None
        x, weight, bias, adapter = call
        if waiting.x is not x:  # cross attention: k and v are given something else than q, and will be again
            self.following[waiting.leader] = None, ()
            self.of_thread.waiting = None
            return None
        (_, its_weight, its_bias, its_adapter), versions, result = found
        same = weight is its_weight and bias is its_bias
        same = same and adapter.down is its_adapter.down and adapter.up is its_adapter.up
        same = same and adapter.weight_scale is its_adapter.weight_scale
        if (
            not same
            or adapter.settings != its_adapter.settings
            or _version(x) != waiting.version
            or versions != _versions(call)
        ):
            return None
        return result if waiting.with_gradients == torch.is_grad_enabled() else None

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
        x = next(iter(calls.values()))[0]
        found = {
            layer: (call, _versions(call), result) for (layer, call), result in zip(calls.items(), results, strict=True)
        }
        self.of_thread.waiting = Waiting(leader, x, _version(x), torch.is_grad_enabled(), found)

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


def _versions(call: LayerCall) -> list[int]:
    _, weight, bias, adapter = call
    tensors = (weight, adapter.down, adapter.up, bias, adapter.weight_scale)
    return [_version(each) for each in tensors if each is not None]


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


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
