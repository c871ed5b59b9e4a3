"""SwiGLU: every feed-forward module that computes `down(silu(gate(x)) * up(x))` through its own projections.

Rebinds    `forward` of the class. The projections are called as the modules they are: LoRA wrappers, hooks and
           quantised layers stay in effect; no weight is read.
To         `npu_swiglu` on one gate_up projection, or on two concatenated ones; or the Triton kernel on two as they are.
           With `swiglu_recompute` the down projection and its adapters keep gate and up, which are kept anyway, in
           place of their product; where that is "auto", those with adapters of LoRA that are one function with it.
Not when   the activation of the instance at hand is not SiLU, or anything (dropout, clamp, norm, scale) stands between
           the parts. A call falls through for tensors on another device, and where somebody listens to the activation.
Delete     when transformers has a registration point for feed-forward layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.readings import NotRead
from npu_patch.ops.recomputed import LEAST_BYTES, recomputed
from npu_patch.ops.swiglu import SWIGLU, case, kept_for_the_backward
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.readings import Readings, in_mode, kind_of
from npu_patch.probe.swiglu import SwiGLUReading, computes_silu, read_swiglu
from npu_patch.serving.bypassed import MODULE_CALL, SILU, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.listeners import listener
from npu_patch.serving.replacement import Unfused, Unserved, replacement_for, tensors_on
from npu_patch.sites.sites import LiveModules, Site, parameter_names, rebindable_forwards


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of one tensor."""
    for site in rebindable_forwards(module):
        names = parameter_names(site.original)
        if names is not None and len(names) == 1:
            yield site


def read_site(site: Site) -> SwiGLUReading | NotRead:
    return read_swiglu(site.owner, site.original)


def bind_site(site: Site, found: SwiGLUReading, context: Context) -> Replacement | NotRead:
    cls, original, names = site.owner, site.original, parameter_names(site.original) or ()
    activations = Activations(found.activation)
    live = context.live_modules(cls)
    if live and not any([activations.is_silu(activations.of(module)) for module in live]):
        return NotRead(f"the activation is {_name_of(activations.of(live[0]))}, not SiLU", in_order=True)

    def read(its_class: type, attributes: Mapping[str, Any]) -> SwiGLUReading | NotRead:
        reading = read_swiglu(its_class, original)
        return reading if reading == found else NotRead("this instance computes no SwiGLU")

    readings: Readings[SwiGLUReading] = Readings(read)
    readings.note(cls, found, {})
    calls, device_type, recompute = Calls(), context.device_type, context.switches["swiglu_recompute"]
    dispatch = context.dispatch(lambda live: _cases(cls, found, live))

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved | Unfused:
        bound = tensors_on(device_type, names, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        (x,) = bound
        reading = readings.of(self)
        if isinstance(reading, NotRead):
            return Unserved(reading.reason)
        activation = activations.of(self)
        if found.activation is not None:
            if not activations.is_silu(activation):
                return Unserved(f"the activation is {_name_of(activation)}")
            heard = listener(activation, found.activation)
            if heard is not None:
                return Unserved(heard)
        down = getattr(self, found.down)
        gate = getattr(self, found.gate)(x)
        up = None if found.up is None else getattr(self, found.up)(x)
        call = (gate,) if up is None else (gate, up)
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            gate, up = gate.chunk(2, -1) if up is None else (gate, up)
            return Unfused(down(activation(gate) * up), serving)
        if not recompute or (gate.nbytes < LEAST_BYTES and recompute is not True):
            return down(serving.run(*call))
        kept = kept_for_the_backward(serving, *call)
        if kept is None:
            return down(serving.run(*call))
        del gate, up, call
        product = serving.run(*kept)
        with recomputed(product, serving.run, *kept, by_all=recompute is True):
            return down(product)

    def observe(layer: torch.nn.Module) -> None:
        readings.of(layer)
        activations.is_silu(activations.of(layer))

    bypassed = Bypassed.by(original, SILU, MODULE_CALL)
    function = replacement_for(original, calls, serve, bypassed=bypassed)
    return Replacement(function, found.name, calls, dispatch=dispatch, observe=observe)


def _cases(cls: type, found: SwiGLUReading, live: LiveModules) -> Iterator[Case]:
    """Of the layers whose projections say how wide they are, in the model's dtype."""
    for module in live.of(cls):
        width = getattr(getattr(module, found.gate, None), "out_features", None)
        if isinstance(width, int):
            yield case(width, live.dtype, in_one=found.up is None)


class Activations:
    """Which live activations are SiLU, training or not: each kind is observed once, and one whose class has become
    another is looked at again."""

    def __init__(self, name: str | None) -> None:
        self._name = name
        self._silu: weakref.WeakKeyDictionary[Any, tuple[type, bool]] = weakref.WeakKeyDictionary()
        self._kinds: dict[Hashable, bool] = {}

    def of(self, module: torch.nn.Module) -> Any:
        return F.silu if self._name is None else getattr(module, self._name, None)

    def is_silu(self, activation: Any) -> bool:
        if self._name is None:
            return True
        cls = type(activation)
        try:
            observed, silu = self._silu[activation]
            if observed is cls:
                return silu
        except KeyError:
            pass
        except TypeError:  # nothing that can be called and referred to
            return False
        if torch.compiler.is_compiling():
            return False
        try:
            kind = kind_of(activation)
            if kind not in self._kinds:
                self._kinds[kind] = all(computes_silu(in_mode(activation, training)) for training in (False, True))
        except TypeError:  # one that cannot be told from another
            return False
        self._silu[activation] = cls, self._kinds[kind]
        return self._kinds[kind]


def _name_of(activation: Any) -> str:
    return getattr(activation, "__name__", type(activation).__name__)


PATCH = Patch("swiglu", "swiglu", SWIGLU, find, read_site, bind_site, options=("swiglu_recompute",), called=("mlp",))
