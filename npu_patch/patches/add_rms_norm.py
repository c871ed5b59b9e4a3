"""Residual add with RMSNorm: every decoder layer that adds what its token mixer returns and normalizes the sum.

Rebinds    `forward` of the mixer's class (attention, gated delta net, ...), with one that runs the original and returns
           its result put off until the add, and the sum until its norm (npu_patch/waiting/sums.py); the replacement of
           the norm then computes both. The layer's forward is left alone: checkpointing depends on it.
To         one Triton kernel forward and one backward, for the add, the norm, and the addition of their gradients.
Not when   the patch of RMSNorm does not serve the norm, anything else is done with the branch or the sum, or either
           reaches another module or leaves the layer, on any way through it, or a way could not be observed. A call
           falls through where it does not come straight from the observed forward, or the layer has other methods than
           the observed ones, under compilation, with hooks on mixer or norm, for tensors on another
           device, and what the kernel does not take.
Delete     when transformers has a registration point for the add and the norm together.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from types import FrameType, ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from npu_patch.numerics.room import in_quiet_room
from npu_patch.ops.add_rms_norm import ADD_RMS_NORM, case, one_after_the_other
from npu_patch.ops.readings import NotRead, RMSNormReading
from npu_patch.ops.rms_norm import RMS_NORM, RMSNormVariant
from npu_patch.patches.patch import NOT_FASTER, Context, Patch, Replacement
from npu_patch.probe.add_rms_norm import AddRMSNormReading, read_add_rms_norm
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.changed_later import CALLS_OF_MODULES, module_of
from npu_patch.serving.implementation import choose, is_plain
from npu_patch.serving.listeners import listener
from npu_patch.serving.replacement import TakenOver, Unfused, Unserved, replacement_for
from npu_patch.sites.sites import LiveModules, Site, forwards, is_checkpointing_layer
from npu_patch.waiting.heads import NORMS
from npu_patch.waiting.sums import Addition, DeferredBranch

# By the class of the mixer.
_READINGS: WeakKeyDictionary[type, list[AddRMSNormReading | NotRead]] = WeakKeyDictionary()


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of the mixers of the layers that `module` defines."""
    found: dict[type, list[AddRMSNormReading | NotRead]] = {}
    for site in forwards(module):
        for mixer, reading in read_add_rms_norm(site.owner, _is_served):
            if not is_checkpointing_layer(mixer):
                found.setdefault(mixer, []).append(reading)
    for cls, readings in found.items():
        _READINGS[cls] = readings
        yield Site(cls, "forward", vars(cls)["forward"])


def read_site(site: Site) -> Sequence[AddRMSNormReading] | NotRead:
    """Of each layer that was observed to call the mixer."""
    found = _READINGS[site.owner]
    readings = [each for each in found if isinstance(each, AddRMSNormReading)]
    return readings or NotRead("; ".join(each.reason for each in found if isinstance(each, NotRead)))


def bind_site(site: Site, readings: Sequence[AddRMSNormReading], context: Context) -> Replacement:
    original = site.original
    calls, device_type = Calls(), context.device_type
    dispatch = context.dispatch(lambda live: _cases(readings, live, context))

    def fuse(
        variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor] | str:
        call = (variant, x, residual, weight, eps)
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            return serving
        calls.ran += 1
        return serving.run(*call)

    def not_fused(reason: str) -> None:
        calls.fell_through[reason] += 1

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if in_quiet_room():
            return TakenOver(original(self, *args, **kwargs))
        if dispatch.idle:
            return Unserved(NOT_FASTER)
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        reason = listener(self, "it")
        if reason is not None:
            return Unserved(reason)
        caller = _caller(readings, self, sys._getframe(1))
        if caller is None:
            return Unserved("not called by the forward of its layer")
        reading, layer = caller
        reason = _why_another(layer, reading) or _why_no_norm(layer, reading)
        if reason is not None:
            return Unserved(reason)
        try:
            result = original(self, *args, **kwargs)
        except BaseException:
            calls.ran -= 1  # which was counted before
            raise
        y, *others = result if type(result) is tuple else (result,)
        if (type(result) is tuple) != reading.in_tuple or not isinstance(y, Tensor) or not is_plain(y):
            return Unfused(result, f"its result is a {type(result).__name__}")
        if y.device.type != device_type:
            return Unfused(result, f"its result is on {y.device.type}")
        branch = DeferredBranch(y, Addition(fuse, not_fused))
        return TakenOver((branch, *others) if reading.in_tuple else branch)

    names = ", ".join(dict.fromkeys(reading.layer.__name__ for reading in readings))
    function = replacement_for(original, calls, serve, bypassed=Bypassed())
    within = tuple(dict.fromkeys(reading.layer for reading in readings))
    return Replacement(function, f"in {names}", calls, None, dispatch, alone=False, within=within)


def _caller(
    readings: Sequence[AddRMSNormReading], mixer: torch.nn.Module, frame: FrameType | None
) -> tuple[AddRMSNormReading, torch.nn.Module] | None:
    """The live layer in whose observed forward `frame` is, with nothing but module calls and our own between; there the
    branch is safe. None for every other caller."""
    while frame is not None and _is_passed_through(frame):
        frame = frame.f_back
    for reading in readings:
        if frame is not None and frame.f_code is reading.code:
            layer = module_of(frame) or frame.f_locals.get(frame.f_code.co_varnames[0])
            return (reading, layer) if isinstance(layer, reading.layer) and _holds(layer, reading, mixer) else None
    return None


def _is_passed_through(frame: FrameType) -> bool:
    """What a forward called by its layer finds between itself and that layer."""
    return frame.f_code in CALLS_OF_MODULES or frame.f_globals.get("__name__", "").startswith("npu_patch.")


def _holds(layer: torch.nn.Module, reading: AddRMSNormReading, mixer: torch.nn.Module) -> bool:
    return any(layer._modules.get(name) is mixer for name in reading.mixers)


def _why_another(layer: torch.nn.Module, reading: AddRMSNormReading) -> str | None:
    """Why the layer is not the one that was observed: what its forward looks up is not what it was."""
    cls, own = type(layer), vars(layer)
    for name, observed in reading.looked_up:
        if getattr(cls, name, None) is not observed or (observed is not None and name in own):
            return f"{name} of {cls.__name__} is not the observed one"
    return None


def _is_served(cls: type[torch.nn.Module]) -> bool:
    """Whether this is a class of norms whose replacement takes part."""
    site = NORMS.get(cls.forward)
    return site is not None and site.calls.active


def _why_no_norm(layer: torch.nn.Module, reading: AddRMSNormReading) -> str | None:
    """Why a norm of this layer would not be there for the sum, or would not be the first that is given it."""
    for name in reading.norms:
        norm = layer._modules.get(name)
        if norm is None:
            continue  # of another kind of layer
        if not _is_served(type(norm)):
            return f"{name} is a {type(norm).__name__}, which is not served"
        found = listener(norm, name)
        if found is not None:
            return found
        if norm._compiled_call_impl is not None:
            return f"{name} is compiled"
    return None


def _cases(readings: Sequence[AddRMSNormReading], live: LiveModules, context: Context) -> Iterator[Case]:
    """Of the layers' norms whose weight says how wide they are, beside an add and the operator for the norm."""
    norm_alone = choose(RMS_NORM.implementations, context.device_type).chosen
    if norm_alone is None:
        return
    original = Alternative("add, then RMSNorm", one_after_the_other(norm_alone.run))
    for reading in readings:
        for layer in live.of(reading.layer):
            for norm in filter(None, map(layer._modules.get, reading.norms)):
                site = NORMS.get(type(norm).forward)
                found = None if site is None else site.reading_of(norm)
                if isinstance(found, RMSNormReading) and found.weight_name:
                    weight = getattr(norm, found.weight_name)
                    yield case(found.variant, weight.shape[-1], live.dtype, weight.dtype, original)


PATCH = Patch("add_rms_norm", "triton", ADD_RMS_NORM, find, read_site, bind_site, needs=("rms_norm",), around=True)
