"""RMSNorm: every module whose forward computes a known RMSNorm, plain or gated.

Rebinds    `forward` of the class, so that instances made later, deep copies and wrapped subclasses are served too.
To         `npu_rms_norm`: one kernel that rounds once, for the five or more of the original; or the Triton kernel,
           which does a gate in the same launch.
Not when   the forward computes something else (grouped or gate-first norms, norms of norms), or the class is a
           checkpointing layer. A call falls through for tensors on another device, DTensors and odd dtypes. Where the
           caller changes the input in place afterwards, a copy of it is what the backward gets.
Delete     when transformers' kernel mapping has an NPU entry for every norm variant and needs no package for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.readings import NotRead, RMSNormReading
from npu_patch.ops.rms_norm import RMS_NORM, case
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.readings import Readings
from npu_patch.probe.rms_norm import read_rms_norm
from npu_patch.serving.bypassed import SILU, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.changed_later import Callers
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import HALF_DTYPES
from npu_patch.serving.listeners import listener_among, listener_to_all
from npu_patch.serving.replacement import TakenOver, Unserved, are_tensors, bind, replacement_for
from npu_patch.serving.shards import is_sharded, like, own_rows
from npu_patch.sites.sites import LiveModules, Site, parameter_names, rebindable_forwards
from npu_patch.waiting import heads as deferred_norm
from npu_patch.waiting.sums import DeferredSum

NOT_KNOWN = NotRead("this instance computes no known RMSNorm")


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of one tensor, or of a tensor and its gate."""
    for site in rebindable_forwards(module):
        names = parameter_names(site.original)
        if names is not None and len(names) in (1, 2):
            yield site


def read_site(site: Site) -> Sequence[RMSNormReading] | NotRead:
    """Of each configuration that its code was observed to ask for."""
    return read_rms_norm(site.owner, site.original, _is_gated(site))


def bind_site(site: Site, found: Sequence[RMSNormReading], context: Context) -> Replacement:
    cls, original, gated = site.owner, site.original, _is_gated(site)

    def read(its_class: type, attributes: Mapping[str, Any]) -> RMSNormReading | NotRead:
        of_kind = read_rms_norm(its_class, original, gated, attributes)
        return NOT_KNOWN if isinstance(of_kind, NotRead) or len(of_kind) > 1 else of_kind[0]

    configuration: dict[str, Any] = {name: None for reading in found for name in reading.configuration}
    readings: Readings[RMSNormReading] = Readings(read, tuple(configuration))
    for reading in found:
        readings.note(cls, reading, {**configuration, **reading.configuration})
    calls, dispatch = Calls(), context.dispatch(lambda live: _cases(cls, readings, live))
    live = [each for each in map(readings.of, context.live_modules(cls)) if isinstance(each, RMSNormReading)]
    variants = dict.fromkeys(reading.variant.name for reading in live or found)
    bypassed = Bypassed.by(original, *([SILU] if gated else []))
    serve = _serving(parameter_names(original) or (), readings, dispatch, calls, context)
    return Replacement(
        replacement_for(original, calls, serve, bypassed=bypassed),
        " or ".join(variants),
        calls,
        dispatch=dispatch,
        observe=readings.of,
        participant=deferred_norm.NormSite(original, readings.of, calls),
    )


def _is_gated(site: Site) -> bool:
    return len(parameter_names(site.original) or ()) == 2


def _serving(
    names: Sequence[str], readings: Readings[RMSNormReading], dispatch: Dispatch, calls: Calls, context: Context
) -> Callable[..., Any]:
    callers, device_type, in_float32 = Callers(), context.device_type, context.switches["gated_rmsnorm_fp32"]

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        bound = bind(names, args, kwargs)
        if bound is not None and type(bound[0]) is DeferredSum:
            half = bound[0].dtype in HALF_DTYPES
            changed = callers.why_changed_later(self, bound[:1]) if half else None
            normed = None if changed else _with_its_sum(readings.of(self), self, bound[0])
            if normed is not None:
                return TakenOver(normed)
            bound[0] = bound[0].materialise(changed or "a norm that is not known")
        if bound is None or not are_tensors(bound):
            return Unserved("arguments that are no tensors")
        x, *gate = bound
        if x.device.type != device_type:
            return Unserved(f"input on {x.device.type}")
        reading = readings.of(self)
        if isinstance(reading, NotRead):
            return Unserved(reading.reason)
        if gate or self._modules:  # gated norms make the module of their activation at every call
            heard = listener_to_all() or listener_among(self)
            if heard is not None:
                return Unserved(heard)
        weight = getattr(self, reading.weight_name) if reading.weight_name else None
        eps = getattr(self, reading.eps_name)
        if is_sharded(x) and not gate:
            return of_shards(self, reading, x, weight, eps)
        deferral = deferred_norm.current()
        kept = _is_kept_by_the_original(x, weight, *gate)
        deferrable = deferral is not None and x.dtype in HALF_DTYPES  # with gradients or without: one function
        changed = callers.why_changed_later(self, (x, *gate)) if kept or deferrable else None
        deferred = None if deferral is None or changed else deferral.defer(self, x, weight, eps, reading.variant)
        if deferred is not None:
            return TakenOver(deferred)
        if kept and changed:
            calls.declined["the input itself"] = f"a copy is kept: {changed}"
            x, *gate = (tensor.clone() for tensor in (x, *gate))
        call = (reading.variant, x, weight, eps, gate[0] if gate else None, in_float32)
        serving = dispatch.serving(calls, *call)
        return Unserved(serving) if isinstance(serving, str) else serving.run(*call)

    def of_shards(norm: torch.nn.Module, reading: RMSNormReading, x: Tensor, weight: Any, eps: float) -> Any:
        """Each rank normalizes its own rows."""
        own = own_rows(x, weight)
        if own is None:
            return Unserved("a tensor whose rows are in parts, or a weight that is")
        if _is_kept_by_the_original(*own) and callers.why_changed_later(norm, (x,)):
            return Unserved("a tensor in parts that is changed later")
        call = (reading.variant, *own, eps, None, in_float32)
        serving = dispatch.serving(calls, *call)
        return Unserved(serving) if isinstance(serving, str) else like(serving.run(*call), x)

    return serve


def _with_its_sum(reading: RMSNormReading | NotRead, norm: torch.nn.Module, total: DeferredSum) -> Tensor | None:
    """The norm of a sum that is not computed yet, or None where the sum comes first."""
    if isinstance(reading, NotRead) or reading.variant.gate is not None:
        return None
    weight = getattr(norm, reading.weight_name) if reading.weight_name else None
    return total.normalized(norm, reading.variant, weight, getattr(norm, reading.eps_name))


def _is_kept_by_the_original(x: Tensor, weight: Tensor | None, *gate: Tensor) -> bool:
    """Whether a backward will need the input, of which the original has a copy in float32. What is compiled keeps what
    it needs."""
    if x.dtype not in HALF_DTYPES or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return any(tensor is not None and tensor.requires_grad for tensor in (x, weight, *gate))


def _cases(cls: type, readings: Readings[RMSNormReading], live: LiveModules) -> Iterator[Case]:
    """Of the layers whose weight says how wide they are, in the model's dtype."""
    for module in live.of(cls):
        reading = readings.of(module)
        if isinstance(reading, NotRead) or reading.weight_name is None:
            continue
        weight = getattr(module, reading.weight_name)
        if weight is not None:
            yield case(reading.variant, weight.shape[-1], live.dtype, weight.dtype)


PATCH = Patch(
    "rms_norm", "rms_norm", RMS_NORM, find, read_site, bind_site, options=("gated_rmsnorm_fp32",), called=("norm",)
)
