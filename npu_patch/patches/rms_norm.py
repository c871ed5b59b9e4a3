"""RMSNorm: every module whose forward computes a known RMSNorm, plain or gated.

Rebinds    `forward` of the class, so that instances made later, deep copies and wrapped subclasses are served too.
To         `npu_rms_norm`: one kernel that rounds once, for the five or more of the original.
Not when   the forward computes something else (grouped or gate-first norms, norms of norms), or the class is a
           checkpointing layer. A call falls through for tensors on another device, DTensors and odd dtypes.
Delete     when transformers' kernel mapping has an NPU entry for every norm variant and needs no package for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.rms_norm import IMPLEMENTATIONS, normalize
from npu_patch.outcome import Calls
from npu_patch.patches.patch import Context, Patch, Readings, Replacement, Skip, Unserved, bind, replacement_for
from npu_patch.probe.rms_norm import RMSNormReading, read_rms_norm
from npu_patch.sites import CHECKPOINTING_LAYER, Site, forwards, is_checkpointing_layer, parameter_names


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of one tensor, or of a tensor and its gate."""
    for site in forwards(module):
        names = parameter_names(site.original)
        if names is not None and len(names) in (1, 2):
            yield site


def replace(site: Site, context: Context) -> Replacement | Skip:
    cls, original = site.owner, site.original
    if is_checkpointing_layer(cls):
        return Skip(CHECKPOINTING_LAYER, notable=False)
    names = parameter_names(original)
    gated = len(names) == 2
    found = read_rms_norm(cls, original, gated)
    if not found.readings:
        return Skip(found.why_none, notable="rmsnorm" in cls.__name__.lower())
    configuration = tuple({name: None for reading in found.readings for name in reading.configuration})

    def read(its_class: type, attributes: Mapping[str, Any]) -> RMSNormReading | None:
        readings = read_rms_norm(its_class, original, gated, attributes).readings
        return readings[0] if len(readings) == 1 else None

    readings = Readings(read, configuration)
    for reading in found.readings:
        values = tuple(reading.configuration.get(name) for name in configuration)
        readings.known[(cls, *values) if configuration else cls] = reading
    calls = Calls()
    device_type, in_float32 = context.device_type, context.switches["gated_rmsnorm_fp32"]
    run, unsupported = context.implementation.run, context.implementation.unsupported

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = bind(names, args, kwargs)
        if bound is None or not all(isinstance(value, Tensor) for value in bound):
            return Unserved("arguments that are no tensors")
        x, *gate = bound
        if x.device.type != device_type:
            return Unserved(f"input on {x.device.type}")
        reading = readings.of(self)
        if reading is None:
            return Unserved("this instance computes no known RMSNorm")
        weight = getattr(self, reading.weight_name) if reading.weight_name else None
        reason = unsupported(x, weight, *gate)
        if reason is not None:
            return Unserved(reason)
        return normalize(
            reading.variant, run, x, weight, getattr(self, reading.eps_name), *gate, gate_in_float32=in_float32
        )

    live = [reading for reading in map(readings.of, context.live_modules(cls)) if reading is not None]
    variants = dict.fromkeys(reading.variant.name for reading in live or found.readings)
    return Replacement(replacement_for(original, calls, serve), " or ".join(variants), calls)


PATCH = Patch("rms_norm", "rms_norm", IMPLEMENTATIONS, find, replace)
