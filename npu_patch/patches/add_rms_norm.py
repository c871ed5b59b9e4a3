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

from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from npu_patch.ops.add_rms_norm import ADD_RMS_NORM, case, one_after_the_other
from npu_patch.ops.readings import NotRead
from npu_patch.ops.rms_norm import RMS_NORM, RMSNormVariant
from npu_patch.patches.deferred_sums import is_served, weighted_norms
from npu_patch.patches.deferred_sums import serving as serving_sums
from npu_patch.patches.patch import NOT_FASTER, Context, Patch, Replacement
from npu_patch.probe.add_rms_norm import AddRMSNormReading, read_add_rms_norm
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import choose
from npu_patch.serving.replacement import replacement_for
from npu_patch.sites.sites import LiveModules, Site, forwards, is_checkpointing_layer

# By the class of the mixer.
_READINGS: WeakKeyDictionary[type, list[AddRMSNormReading | NotRead]] = WeakKeyDictionary()


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of the mixers of the layers that `module` defines."""
    found: dict[type, list[AddRMSNormReading | NotRead]] = {}
    for site in forwards(module):
        for mixer, reading in read_add_rms_norm(site.owner, is_served):
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
    calls = Calls()
    dispatch = context.dispatch(lambda live: _cases(readings, live, context))

    def fuse(
        norm: torch.nn.Module, variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor] | str:
        call = (variant, x, residual, weight, eps)
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            return serving
        calls.ran += 1
        return serving.run(*call)

    def why_not(kwargs: object) -> str | None:
        return NOT_FASTER if dispatch.idle else None

    names = ", ".join(dict.fromkeys(reading.layer.__name__ for reading in readings))
    serve = serving_sums(site.original, readings, calls, context.device_type, fuse, why_not)
    function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
    within = tuple(dict.fromkeys(reading.layer for reading in readings))
    return Replacement(function, f"in {names}", calls, None, dispatch, alone=False, within=within)


def _cases(readings: Sequence[AddRMSNormReading], live: LiveModules, context: Context) -> Iterator[Case]:
    """Of the layers' norms whose weight says how wide they are, beside an add and the operator for the norm."""
    norm_alone = choose(RMS_NORM.implementations, context.device_type).chosen
    if norm_alone is None:
        return
    original = Alternative("add, then RMSNorm", one_after_the_other(norm_alone.run))
    for _, variant, weight in weighted_norms(readings, live):
        yield case(variant, weight.shape[-1], live.dtype, weight.dtype, original)


PATCH = Patch("add_rms_norm", "triton", ADD_RMS_NORM, find, read_site, bind_site, needs=("rms_norm",), around=True)
