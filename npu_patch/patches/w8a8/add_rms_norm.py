"""Add, RMSNorm and quantisation in one, in generation: of the norms that layers of int8 weights are given.

Rebinds    `forward` of the mixer's class (attention, gated delta net), as patches/add_rms_norm.py does, and stands
           around what that has put there.
To         `npu_add_rms_norm_dynamic_quant`. What the norm returns then waits (waiting/quantised_norms.py): layers of
           int8 weights take its rows, and anybody else gets the norm of the sum. Where somebody else was first, it is
           not tried again for that norm.
Not when   no layer of the model that such a norm stands in has int8 weights beside the mixer's, or no model was given.
           A call falls through with gradients, without a cache, for more than one token, for what the operator does not
           take (`1 + weight`), and where patches/add_rms_norm.py has its reasons.
Delete     when transformers has a registration point for the add, the norm and the quantisation together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from npu_patch.decoding.inputs import CACHES
from npu_patch.ops.readings import NotRead
from npu_patch.ops.rms_norm import RMSNormVariant
from npu_patch.ops.w8a8.add_rms_norm import W8A8_ADD_RMS_NORM, case
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.deferred_sums import is_served, serving, weighted_norms
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.add_rms_norm import AddRMSNormReading, possible_mixers, read_add_rms_norm
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.replacement import replacement_for
from npu_patch.sites.sites import LiveModules, Site, forwards, is_checkpointing_layer
from npu_patch.waiting.quantised_norms import QuantisedNorm

NOTHING_IN_INT8 = NotRead("no norm of a sum is multiplied in int8", notable=False)


@dataclass
class Layers:
    """Of one file. They are observed where a model has int8 weights in one: few have."""

    of_mixer: dict[type, list[type]] = field(default_factory=dict)
    observed: dict[type, list[tuple[type, AddRMSNormReading | NotRead]]] = field(default_factory=dict)

    def readings(self, mixer: type, live: LiveModules) -> Iterator[AddRMSNormReading | NotRead]:
        for layer in self.of_mixer[mixer]:
            if not any(_in_int8(each) for each in live.of(layer)):
                continue
            if layer not in self.observed:
                self.observed[layer] = read_add_rms_norm(layer, is_served)
            yield from (reading for cls, reading in self.observed[layer] if cls is mixer)


# By the class of what may be a mixer.
_LAYERS: WeakKeyDictionary[type, Layers] = WeakKeyDictionary()


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of what the layers that `module` defines may call before a norm."""
    layers = Layers()
    for site in forwards(module):
        for mixer in dict.fromkeys(possible_mixers(site.owner, is_served)):
            if "forward" in vars(mixer) and not is_checkpointing_layer(mixer):
                layers.of_mixer.setdefault(mixer, []).append(site.owner)
    for mixer in layers.of_mixer:
        _LAYERS[mixer] = layers
        yield Site(mixer, "forward", vars(mixer)["forward"])


def read_site(site: Site) -> Layers:
    return _LAYERS[site.owner]


def bind_site(site: Site, layers: Layers, context: Context) -> Replacement | NotRead:
    live = context.live
    assert live is not None  # `concerns`
    found = list(layers.readings(site.owner, live))
    readings = [each for each in found if isinstance(each, AddRMSNormReading)]
    if found and not readings:
        return NotRead("; ".join(each.reason for each in found if isinstance(each, NotRead)))
    cases, taken_by = list(_cases(readings, live)), context.choice.chosen
    reasons = [None if taken_by is None else each.why_not_by(taken_by) for each in cases]
    if not cases:
        return NOTHING_IN_INT8
    if all(reasons):
        return NotRead("; ".join(dict.fromkeys(filter(None, reasons))), in_order=True)
    calls = Calls()
    dispatch = context.dispatch(partial(_cases, readings))
    in_floats: WeakSet[torch.nn.Module] = WeakSet()  # norms that somebody needed in floating point

    def why_not(kwargs: dict[str, Any]) -> str | None:
        if torch.is_grad_enabled():
            return "with gradients"
        return "without a cache" if all(kwargs.get(name) is None for name in CACHES) else None

    def fuse(
        norm: torch.nn.Module, variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor] | str:
        if norm in in_floats:
            return "its norm was used in floating point"
        call = (variant, x, residual, weight, eps)
        chosen = dispatch.serving(calls, *call)
        if isinstance(chosen, str):
            return chosen
        calls.ran += 1
        rows, total = chosen.run(*call)

        def told(used_by: str) -> None:
            calls.ran -= 1
            calls.fell_through[f"the norm is used ({used_by}) before it is multiplied in int8"] += 1
            in_floats.add(norm)

        return QuantisedNorm(total, rows, partial(type(norm).forward, norm), told), total

    serve = serving(site.original, readings, calls, context.device_type, fuse, why_not, _why_several_tokens)
    names = ", ".join(dict.fromkeys(reading.layer.__name__ for reading in readings))
    function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
    return Replacement(function, f"in {names}", calls, dispatch=dispatch, alone=False, within=None)


def _has_int8(live: LiveModules | None) -> bool:
    return live is not None and bool(live.of(W8A8Linear))


def _in_int8(layer: torch.nn.Module, apart_from: Collection[str] = ()) -> bool:
    """Whether it has int8 weights in other modules than these."""
    parts = (part for name, part in layer.named_children() if name not in apart_from)
    return any(isinstance(each, W8A8Linear) for part in parts for each in part.modules())


def _why_several_tokens(y: Tensor) -> str | None:
    return None if y.dim() == 3 and y.shape[1] == 1 else "several tokens"


def _cases(readings: Sequence[AddRMSNormReading], live: LiveModules) -> Iterator[Case]:
    for reading in readings:
        for layer, variant, weight in weighted_norms([reading], live):
            if _in_int8(layer, reading.mixers):
                yield case(variant, weight.shape[-1], live.dtype, weight.dtype)


PATCH = Patch(
    "w8a8_norm",
    "w8a8",
    W8A8_ADD_RMS_NORM,
    find,
    read_site,
    bind_site,
    needs=("rms_norm", "w8a8"),
    around=True,
    tunable=False,
    concerns=_has_int8,
)
