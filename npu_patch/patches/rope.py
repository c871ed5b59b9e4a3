"""RoPE: every module-level function that rotates one or two tensors by given cos and sin.

Rebinds    the function's name in the modeling module: all callers look it up there at call time, in every version.
To         `npu_rotary_mul`, through an autograd function whose backward is the same kernel.
Not when   positions or sections the function takes matter in a way that is not known, or it rotates complex numbers.
           A call falls through for tensors on another device and for the operator's limits.
Delete     when transformers has a registration point for rotary functions that works without the kernels package.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch

from npu_patch.ops.readings import NotRead, RoPEReading
from npu_patch.ops.rope import ROPE, case, mix_sections, rotary_dim
from npu_patch.patches.head_sizes import head_sizes
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.rope import read_rope
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.replacement import TakenOver, Unserved, are_tensors, bind, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import LiveModules, Site, functions, unwrapped
from npu_patch.waiting import heads as deferred_norm


def find(module: ModuleType) -> Iterable[Site]:
    """Functions that take cos and sin, or call themselves rotary."""
    for site in functions(module):
        function = unwrapped(site.original)
        parameters = {} if function is None else inspect.signature(function).parameters
        if ("cos" in parameters and "sin" in parameters) or "rotary" in site.name:
            yield site


def read_site(site: Site) -> RoPEReading | NotRead:
    function = unwrapped(site.original)
    reading = NotRead("it is no function") if function is None else read_rope(function)
    return reading.notable_if("rotary" in site.name) if isinstance(reading, NotRead) else reading


def bind_site(site: Site, reading: RoPEReading, context: Context) -> Replacement:
    original, signature, variant = site.original, reading.signature, reading.variant
    calls, device_type = Calls(), context.device_type
    dispatch = context.dispatch(lambda live: _cases(site, reading, live))

    names = signature.names
    first_of_rest = len(signature.tensors)  # the tensors come first
    at_cos, at_sin = names.index("cos"), names.index("sin")
    at_dimension = None if signature.dimension is None else names.index(signature.dimension)

    def serve(*args: Any, **kwargs: Any) -> Any:
        bound = bind(names, args, kwargs)
        if bound is None:
            return Unserved("arguments that the function does not name")
        tensors, cos, sin = bound[:first_of_rest], bound[at_cos], bound[at_sin]
        dimension = None if at_dimension is None else bound[at_dimension]
        dimension = reading.unsqueeze_dim if dimension is None else dimension
        if not are_tensors((*tensors, cos, sin)):
            if any(isinstance(tensor, deferred_norm.DeferredHeads) for tensor in tensors):
                rotated = deferred_norm.rotate_deferred(reading, tensors, cos, sin, dimension)
                return TakenOver(rotate_normalized(args, kwargs) if rotated is None else rotated)
            return Unserved("arguments that are no tensors")
        if tensors[0].device.type != device_type:
            return Unserved(f"input on {tensors[0].device.type}")
        if signature.sections is not None:
            sections = bound[names.index(signature.sections)]
            if cos.dim() == 0 or cos.shape[0] != 3 or 2 * sum(sections) != cos.shape[-1]:
                return Unserved(f"sections {sections} of tables of shape {tuple(cos.shape)}")
            cos, sin = mix_sections(cos, sections), mix_sections(sin, sections)
        if dimension is not None:
            cos, sin = cos.unsqueeze(dimension), sin.unsqueeze(dimension)
        serving = dispatch.serving(calls, tensors, cos, sin, variant)
        if isinstance(serving, str):
            return Unserved(serving)
        if not reading.partial:
            width = rotary_dim(cos, variant)
            if [x for x in tensors if x.shape[-1] != width]:
                return Unserved("tables narrower than the head")
        rotated = serving.run(tensors, cos, sin, variant)
        return rotated[0] if first_of_rest == 1 else tuple(rotated)

    def rotate_normalized(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Anew, with tensors."""
        normalized = [each.normalized() if isinstance(each, deferred_norm.DeferredHeads) else each for each in args]
        by_name = {
            name: each.normalized() if isinstance(each, deferred_norm.DeferredHeads) else each
            for name, each in kwargs.items()
        }
        return function(*normalized, **by_name)

    # What the kernels package wrapped into a module keeps its wrapper as the way to fall through.
    function = replacement_for(original, calls, serve, named_after=unwrapped(original))
    participant = deferred_norm.RoPESite(original, reading, calls)
    return Replacement(function, variant.name, calls, dispatch=dispatch, participant=participant, one_of_several=True)


def _cases(site: Site, reading: RoPEReading, live: LiveModules) -> Iterator[Case]:
    """Of the layers that look the function up, in the model's dtype and in float32, which tables may stay in."""
    layers = [module for module in live if type(module).__module__ == site.owner.__name__]
    of_each_class = {type(layer): layer for layer in layers}
    users = {cls for cls, layer in of_each_class.items() if site.name in names_used(type(layer).forward)}
    for sizes in head_sizes((layer for layer in layers if type(layer) in users), live):
        head_dim = sizes.head_dim if reading.partial else sizes.rotary  # of what is given to it
        for dtype in dict.fromkeys((live.dtype, torch.float32)):
            yield case(reading.variant, max(sizes.heads, sizes.key_heads), head_dim, sizes.rotary, dtype)


PATCH = Patch("rope", "rope", ROPE, find, read_site, bind_site, called=("rotary_pos_emb",))
