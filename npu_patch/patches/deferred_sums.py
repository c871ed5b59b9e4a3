"""What a token mixer returns, put off until the add and the norm that follow in its decoder layer: where a call is the
observed one, for patches that compute the two together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.room import in_quiet_room
from npu_patch.ops.readings import RMSNormReading
from npu_patch.ops.rms_norm import RMSNormVariant
from npu_patch.probe.add_rms_norm import AddRMSNormReading
from npu_patch.serving.calls import Calls
from npu_patch.serving.changed_later import CALLS_OF_MODULES, module_of
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.listeners import listener
from npu_patch.serving.replacement import TakenOver, Unfused, Unserved
from npu_patch.sites.sites import LiveModules
from npu_patch.waiting.heads import NORMS
from npu_patch.waiting.sums import Addition, DeferredBranch, Fuse


def serving(
    original: Callable[..., Any],
    readings: Sequence[AddRMSNormReading],
    calls: Calls,
    device_type: str,
    fuse: Fuse,
    why_not: Callable[[dict[str, Any]], str | None],
    unfit: Callable[[Tensor], str | None] = lambda y: None,
) -> Callable[..., Any]:
    """What serves a call of a mixer's forward, the `original`. `fuse` computes the add and the norm, and counts that;
    `why_not(kwargs)` is asked before the mixer runs, `unfit(y)` of its result."""

    def not_fused(reason: str) -> None:
        calls.fell_through[reason] += 1

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if in_quiet_room():
            return TakenOver(original(self, *args, **kwargs))
        reason = why_not(kwargs)
        if reason is None and torch.compiler.is_compiling():
            reason = "being compiled"
        reason = reason or listener(self, "it")
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
        deferred = type(y) is DeferredBranch and not y.settled  # by another patch at this forward
        tensor = y.peek() if deferred else y
        if (type(result) is tuple) != reading.in_tuple or not isinstance(tensor, Tensor) or not is_plain(tensor):
            return Unfused(result, f"its result is a {type(result).__name__}")
        reason = unfit(tensor) if tensor.device.type == device_type else f"its result is on {tensor.device.type}"
        if reason is not None:
            return Unfused(result, reason)
        addition = Addition(fuse, not_fused)
        branch = y.offered_to(addition) if deferred else DeferredBranch(tensor, addition)
        return TakenOver((branch, *others) if reading.in_tuple else branch)

    return serve


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


def is_served(cls: type[torch.nn.Module]) -> bool:
    """Whether this is a class of norms whose replacement takes part."""
    site = NORMS.get(cls.forward)
    return site is not None and site.calls.active


def _why_no_norm(layer: torch.nn.Module, reading: AddRMSNormReading) -> str | None:
    """Why a norm of this layer would not be there for the sum, or would not be the first that is given it."""
    for name in reading.norms:
        norm = layer._modules.get(name)
        if norm is None:
            continue  # of another kind of layer
        if not is_served(type(norm)):
            return f"{name} is a {type(norm).__name__}, which is not served"
        found = listener(norm, name)
        if found is not None:
            return found
        if norm._compiled_call_impl is not None:
            return f"{name} is compiled"
    return None


def weighted_norms(
    readings: Sequence[AddRMSNormReading], live: LiveModules
) -> Iterator[tuple[torch.nn.Module, RMSNormVariant, Tensor]]:
    """Layers of the model, each with what its norms compute, of those whose weight says how wide they are."""
    for reading in readings:
        for layer in live.of(reading.layer):
            for norm in filter(None, map(layer._modules.get, reading.norms)):
                site = NORMS.get(type(norm).forward)
                found = None if site is None else site.reading_of(norm)
                if isinstance(found, RMSNormReading) and found.weight_name:
                    yield layer, found.variant, getattr(norm, found.weight_name)
