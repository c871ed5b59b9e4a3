"""Patch embeddings: convolutions whose kernel is their stride, as products over flattened patches.

Rebinds    `forward` of torch's Conv2d and Conv3d. The layer is called as ever, so that hooks on it, adapters around it
           and whoever gathers its weight stay in effect; what a model does around it need not be known.
To         `linear` of the patches and of the weight as a matrix, which it is: nothing is renamed, nothing is copied.
Not when   it was not measured to be faster at the layer's sizes (`TWINKLE_NPU_PATCH_EMBEDDING=1`: wherever it can).
           Other convolutions, other devices, parts of sharded weights and the compiler get the original.
Delete     when CANN takes such a convolution for the product that it is, wherever that is faster.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Conv2d, Conv3d

from npu_patch.ops.patch_embedding import PATCH_EMBEDDING, cases
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import NOT_FASTER, Context, Patch, Replacement
from npu_patch.probe.patch_embedding import SETTINGS, Patches, read_patches, settings_of
from npu_patch.probe.readings import Readings
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import FLOAT_DTYPES
from npu_patch.serving.replacement import Unserved, replacement_for, tensors_on
from npu_patch.sites.sites import LiveModules, Site, parameter_names, rebindable_forwards

SQUARE = {"kernel_size": 4, "stride": 4, "padding": 0, "dilation": 1}  # of the class itself, in each dimension
OF = {Conv2d: 2, Conv3d: 3}
BYPASSED = {Conv2d: (F, "conv2d"), Conv3d: (F, "conv3d")}
NO_PATCHES = NotRead("no layer of it embeds patches", notable=False)


def find(module: ModuleType) -> Iterable[Site]:
    return (site for site in rebindable_forwards(module) if site.owner in OF)


def read_site(site: Site) -> Patches | NotRead:
    dimensions = OF[site.owner]
    settings = {name: (value,) * dimensions for name, value in SQUARE.items()}
    return read_patches(site.owner, site.original, settings_of({**settings, "groups": 1, "padding_mode": "zeros"}))


def _readings(site: Site) -> Readings[Patches]:
    def read(its_class: type, attributes: Mapping[str, Any]) -> Patches | NotRead:
        return read_patches(its_class, site.original, settings_of(attributes))

    return Readings(read, SETTINGS)


def bind_site(site: Site, found: Patches, context: Context) -> Replacement | NotRead:
    cls, original, device_type = site.owner, site.original, context.device_type
    readings, names, calls = _readings(site), parameter_names(site.original) or (), Calls()
    if not (_layers(site, readings, context) if context.live else _is_for_later(context)):
        return NO_PATCHES
    dispatch = context.dispatch(lambda live: _cases(cls, readings, live))

    def serve(self: Any, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        if torch.compiler.is_compiling():
            return Unserved("compiling: the compiler has convolutions of its own")
        if not dispatch.takes_any:
            return Unserved(NOT_FASTER)
        if self.kernel_size != self.stride:  # most convolutions: nothing else need be asked
            return Unserved("its kernel is not its stride")
        bound = tensors_on(device_type, names, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        reading = readings.of(self)
        if isinstance(reading, NotRead):
            return Unserved(reading.reason)
        x, weight, bias = bound[0], self.weight, self.bias
        if weight.shape[2:] != reading.kernel:
            return Unserved(f"a weight of {weight.dim()} dimensions that is no kernel")
        if torch.is_autocast_enabled(device_type):
            dtype = torch.get_autocast_dtype(device_type)
            x, weight, bias = _cast(x, dtype), _cast(weight, dtype), None if bias is None else _cast(bias, dtype)
        serving = dispatch.serving(calls, x, weight, bias)
        return Unserved(serving) if isinstance(serving, str) else serving.run(x, weight, bias)

    function = replacement_for(original, calls, serve, bypassed=Bypassed.by(original, BYPASSED[cls]))
    return Replacement(function, found.name, calls, dispatch=dispatch, observe=readings.of)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As autocast does: neither numbers that are none nor float64."""
    return tensor.to(dtype) if tensor.dtype in FLOAT_DTYPES else tensor


def _is_for_later(context: Context) -> bool:
    """Without a model nothing is measured: what is known is what was asked for, and what a tuning file says."""
    return context.choice.forced or context.switches.tune is not None


def _layers(site: Site, readings: Readings[Patches], context: Context) -> int:
    return sum(isinstance(readings.of(layer), Patches) for layer in context.live_modules(site.owner))


def layers(site: Site, context: Context) -> int | None:
    return _layers(site, _readings(site), context) if context.live else None


def _cases(cls: type, readings: Readings[Patches], live: LiveModules) -> Iterator[Case]:
    """In the dtype of each, and under autocast to half precision."""
    convolutions: Iterable[Any] = live.of(cls)
    for layer in convolutions:
        reading = readings.of(layer)
        if isinstance(reading, Patches) and layer.in_channels:  # a lazy one has none yet
            shape = (layer.out_channels, layer.in_channels, *reading.kernel)
            for dtype in dict.fromkeys((layer.weight.dtype, torch.bfloat16)):
                yield from cases(shape, layer.bias is not None, dtype)


PATCH: Patch[Patches, ..., Tensor] = Patch(
    "patch_embedding",
    "patch_embedding",
    PATCH_EMBEDDING,
    find,
    read_site,
    bind_site,
    layers=layers,
    libraries=("torch.nn.modules.conv",),
    optional="patch_embedding",
)
