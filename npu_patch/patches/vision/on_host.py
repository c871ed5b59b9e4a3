"""What a model for images asks about grids and token ids, answered without waiting for the device each time.

Rebinds    in the classes of models and towers: `forward`, `get_image_features`, `get_video_features`,
           `get_placeholder_mask` and `get_rope_index`; in modeling modules, the functions of transformers' vision_utils
           that work out positions, windows and lengths of a grid, and its `create_recurrent_attention_mask`.
To         the same functions, on integers that are known on the host too (npu_patch/waiting/known_on_host.py): one copy
           to the host per forward for ids, masks and grids together (npu_patch/serving/read_in_forward.py). Positions,
           windows and lengths are worked out on the host; image tokens are put in their places by their numbers, in
           place of a boolean mask.
Not when   there is no image, under compilation, where a part of the model is compiled, for tensors on another device.
Delete     when transformers' processors hand all of this over from the host (the `kwargs` of vision_utils).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.written import version_of
from npu_patch.ops.host_integers import HOST_INTEGERS
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.once_per_step import uploaded
from npu_patch.serving.read_in_forward import AS_INTEGERS, MOST_FLOATS, Forward, forward_of, running
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import LiveModules, Site, innermost, is_checkpointing_layer
from npu_patch.waiting.known_on_host import KnownOnHost

FORWARD, PLACEHOLDERS, POSITIONS = "forward", "get_placeholder_mask", "get_rope_index"
FEATURES = ("get_image_features", "get_video_features")
IMAGES, GRID, TABLES = "pixel_values", "grid_thw", "transformers.vision_utils"
ENCODED, COMPILED = "mm_encoder_outputs", "a part of the model is compiled"
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
PADDING, PADDING_OF_STATES = "attention_mask", "create_recurrent_attention_mask"
Serve = Callable[..., Any]


def find(module: ModuleType) -> Iterable[Site]:
    for name, value in list(vars(module).items()):
        function = innermost(value) if callable(value) else None
        if isinstance(function, FunctionType) and (
            (function.__module__ == TABLES and GRID in _parameters(function)) or name == PADDING_OF_STATES
        ):
            yield Site(module, name, value)
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == module.__name__:
            yield from _methods(cls)


def _methods(cls: type) -> Iterator[Site]:
    own = vars(cls)
    forward = own.get(FORWARD)
    if PLACEHOLDERS not in own and POSITIONS not in own:
        if isinstance(forward, FunctionType) and GRID in _parameters(forward) and not is_checkpointing_layer(cls):
            yield Site(cls, FORWARD, forward)  # of a tower
        return
    for name in (FORWARD, PLACEHOLDERS, POSITIONS, *FEATURES):
        function = own.get(name)
        if isinstance(function, FunctionType) and (name not in FEATURES or _grids(function)):
            yield Site(cls, name, function)


def _is_of(model: LiveModules, site: Site) -> bool:
    """Whether it has a layer of the site's class, or of a class of the site's module that has sites."""
    if isinstance(site.owner, type):
        return any(isinstance(each, site.owner) for each in model)
    return any(type(each).__module__ == site.owner.__name__ and any(_methods(type(each))) for each in model)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _grids(function: Callable[..., Any]) -> list[str]:
    return [name for name in _parameters(function) if name.endswith(GRID)]


def read_site(site: Site) -> AsNamed:
    """Whatever it computes: it computes it still, on integers with the same values."""
    return AsNamed("of integers known on the host")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    if context.live is not None and not _is_of(context.live, site):
        return NotRead("no part of the model has images", notable=False)
    make = _WAYS.get(site.name, _features if site.name in FEATURES else _tables)
    calls = Calls()
    serve = make(site.original, context.device_type)
    return Replacement(replacement_for(site.original, calls, serve, bypassed=Bypassed()), reading.name, calls)


def _entry(original: Callable[..., Any], device_type: str) -> Serve:
    """A forward in which all small integers of the inputs are read in one copy, where there are images."""

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _has_images(kwargs):
            return TakenOver(original(self, *args, **kwargs))
        with forward_of(self) as forward:
            if not forward.compiled:
                forward.read([each for each in (*args, *kwargs.values()) if _is_read(each, device_type)])
                return original(self, *args, **kwargs)
        return Unserved(COMPILED)

    return serve


def _has_images(kwargs: dict[str, Any]) -> bool:
    names = [name for name, value in kwargs.items() if value is not None]
    return any(name.startswith(IMAGES) or name.endswith(GRID) for name in names) or bool(kwargs.get(ENCODED))


def _features(original: Callable[..., Any], device_type: str) -> Serve:
    """With grids that are known; pixels stay what they are."""
    names = _parameters(original)
    grids = [(name, names.index(name) - 1) for name in _grids(original)]

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        with forward_of(self) as forward:
            if not forward.compiled:
                given, named = list(args), dict(kwargs)
                for name, at in grids:
                    if _is_read(named.get(name), device_type):
                        named[name] = _known(forward, named[name])
                    elif at < len(given) and _is_read(given[at], device_type):
                        given[at] = _known(forward, given[at])
                return original(self, *given, **named)
        return Unserved(COMPILED)

    return serve


def _placeholders(original: Callable[..., Any], device_type: str) -> Serve:
    def serve(self: torch.nn.Module, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        forward = running()
        if forward is None or forward.compiled:
            return Unserved("outside of its model's forward" if forward is None else COMPILED)
        if not _is_read(input_ids, device_type):
            return Unserved("no token ids on the device")
        return original(self, _known(forward, input_ids), *args, **kwargs)

    return serve


def _padding(original: Callable[..., Any], device_type: str) -> Serve:
    """Whether a padding mask hides anything, where the host has read it."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        mask: Any = kwargs.get(PADDING)
        forward = running()
        if forward is None or not _is_read(mask, device_type) or forward.known(mask) is None:
            return TakenOver(original(*args, **kwargs))
        found = original(*args, **{**kwargs, PADDING: _known(forward, mask)})
        return found.there() if isinstance(found, KnownOnHost) else found

    return serve


def _positions(original: Callable[..., Any], device_type: str) -> Serve:
    """All of it on the host; positions go to the device."""
    return lambda *args, **kwargs: _there(original, device_type, args, kwargs, uploaded)


def _tables(original: Callable[..., Any], device_type: str) -> Serve:
    """What a tower takes on to its layers stays known, within a forward that knows of no compiled part."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        forward = running()
        known = forward is not None and not forward.compiled
        return _there(original, device_type, args, kwargs, KnownOnHost if known else uploaded)

    return serve


def _there(
    original: Callable[..., Any],
    device_type: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    returned: Callable[[Tensor, torch.device], Tensor],
) -> Any:
    """On copies of what the host may ask about; what is large and no integer is only handed on."""
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    read = [each for each in tensors if _is_read(each, device_type)]
    asked = [each for each in tensors if isinstance(each, KnownOnHost)] or read
    if not asked or torch.compiler.is_compiling():
        return Unserved("no integers on the device")
    device, forward, copies = asked[0].device, running() or Forward(), list[Tensor]()
    forward.read(read)

    def copied(each: Tensor) -> Tensor:
        if not isinstance(each, KnownOnHost) and not _is_read(each, device_type):
            return each
        copies.append(each.host.clone() if isinstance(each, KnownOnHost) else forward.values(each))
        return copies[-1]

    host_args, host_kwargs = tree_map_only(Tensor, copied, (args, kwargs))
    written = [version_of(each) for each in copies]
    try:
        result = original(*host_args, **host_kwargs)
    except Exception as problem:  # the original says it in its own words
        return Unserved(f"on the host it fails: {error_text(problem)}")
    if [version_of(each) for each in copies] != written:
        return Unserved("it writes to what it is given")
    return tree_map_only(Tensor, lambda each: returned(each, device) if each.device.type == "cpu" else each, result)


def _is_read(value: Any, device_type: str) -> bool:
    """Integers of the device, and a few floats, which the host is to know."""
    return (
        isinstance(value, Tensor)
        and is_plain(value)
        and value.device.type == device_type
        and (value.dtype in INTEGERS or (value.dtype in AS_INTEGERS and value.numel() <= MOST_FLOATS))
    )


def _known(forward: Forward, tensor: Tensor) -> Tensor:
    known: Tensor = KnownOnHost(forward.values(tensor), tensor.device)
    return known


_WAYS: dict[str, Callable[[Callable[..., Any], str], Serve]] = {
    FORWARD: _entry,
    PLACEHOLDERS: _placeholders,
    POSITIONS: _positions,
    PADDING_OF_STATES: _padding,
}
PATCH = Patch("vision_on_host", "vision_on_host", HOST_INTEGERS, find, read_site, bind_site, tunable=False, around=True)
