"""What a model for images asks about grids and token ids, answered without waiting for the device each time.

Rebinds    in the classes of models: `forward`, `get_image_features`, `get_video_features`, `get_placeholder_mask` and
           `get_rope_index`; in modeling modules, the functions of transformers' vision_utils that work out positions,
           windows and lengths of a grid, and its `create_recurrent_attention_mask`.
To         the same functions, on integers that are known on the host too (npu_patch/waiting/known_on_host.py): one
           copy to the host per step for ids, masks and grids together. Positions, windows and lengths are worked out on
           the host; image tokens are put in their places by their numbers, in place of a boolean mask.
Not when   there is no image, under compilation, for tensors on another device.
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
from npu_patch.ops.host_integers import HOST_INTEGERS
from npu_patch.ops.readings import AsNamed
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.once_per_step import HOST_READS, uploaded, version_of
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import Site, innermost
from npu_patch.waiting.known_on_host import KnownOnHost

FORWARD, PLACEHOLDERS, POSITIONS = "forward", "get_placeholder_mask", "get_rope_index"
FEATURES = ("get_image_features", "get_video_features")
IMAGES, GRID, TABLES = "pixel_values", "grid_thw", "transformers.vision_utils"
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
    if PLACEHOLDERS not in own and POSITIONS not in own:
        return
    for name in (FORWARD, PLACEHOLDERS, POSITIONS, *FEATURES):
        function = own.get(name)
        if isinstance(function, FunctionType) and (name not in FEATURES or _grids(function)):
            yield Site(cls, name, function)


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _grids(function: Callable[..., Any]) -> list[str]:
    return [name for name in _parameters(function) if name.endswith(GRID)]


def read_site(site: Site) -> AsNamed:
    """Whatever it computes: it computes it still, on integers with the same values."""
    return AsNamed("of integers known on the host")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    make = _WAYS.get(site.name, _features if site.name in FEATURES else _on_host)
    calls = Calls()
    serve = make(site.original, context.device_type)
    return Replacement(replacement_for(site.original, calls, serve, bypassed=Bypassed()), reading.name, calls)


def _forward(original: Callable[..., Any], device_type: str) -> Serve:
    """All integers of a model's inputs in one copy, where there are images."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        if not any(name.startswith(IMAGES) and value is not None for name, value in kwargs.items()):
            return TakenOver(original(*args, **kwargs))
        HOST_READS.together([each for each in kwargs.values() if _is_read(each, device_type)])
        return original(*args, **kwargs)

    return serve


def _placeholders(original: Callable[..., Any], device_type: str) -> Serve:
    def serve(self: torch.nn.Module, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_read(input_ids, device_type):
            return Unserved("no token ids on the device")
        return original(self, _known(input_ids), *args, **kwargs)

    return serve


def _features(original: Callable[..., Any], device_type: str) -> Serve:
    """The grids alone: pixels stay what they are."""
    names = _parameters(original)
    grids = {name: names.index(name) for name in _grids(original)}

    def serve(*args: Any, **kwargs: Any) -> Any:
        given, named = list(args), dict(kwargs)
        for name, at in grids.items():
            if _is_read(named.get(name), device_type):
                named[name] = _known(named[name])
            elif at < len(given) and _is_read(given[at], device_type):
                given[at] = _known(given[at])
        result = original(*given, **named)
        known = any(isinstance(each, KnownOnHost) for each in (*given, *named.values()))
        return result if known else TakenOver(result)

    return serve


def _padding(original: Callable[..., Any], device_type: str) -> Serve:
    """Whether a padding mask hides anything, where the host has read it."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        mask: Any = kwargs.get(PADDING)
        if not _is_read(mask, device_type) or HOST_READS.known(mask) is None:
            return TakenOver(original(*args, **kwargs))
        found = original(*args, **{**kwargs, PADDING: _known(mask)})
        return found.there() if isinstance(found, KnownOnHost) else found

    return serve


def _positions(original: Callable[..., Any], device_type: str) -> Serve:
    """All of it on the host; positions go to the device."""

    def serve(*args: Any, **kwargs: Any) -> Any:
        return _there(original, device_type, args, kwargs, uploaded)

    return serve


def _on_host(original: Callable[..., Any], device_type: str) -> Serve:
    def serve(*args: Any, **kwargs: Any) -> Any:
        return _there(original, device_type, args, kwargs, KnownOnHost)

    return serve


def _there(
    original: Callable[..., Any],
    device_type: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    returned: Callable[[Tensor, torch.device], Tensor],
) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    known = [each for each in tensors if isinstance(each, KnownOnHost)]
    read = [each for each in tensors if _is_read(each, device_type)]
    if not known and not read:
        return Unserved("no integers on the device")
    if len(known) + len(read) < len(tensors):
        return Unserved("other tensors than integers of the device")
    device = (known or read)[0].device
    HOST_READS.together(read)
    copies: list[Tensor] = []

    def copied(each: Tensor) -> Tensor:
        copies.append((each.host if isinstance(each, KnownOnHost) else HOST_READS.on_host(each)).clone())
        return copies[-1]

    host_args, host_kwargs = tree_map_only(Tensor, copied, (args, kwargs))
    written = [version_of(each) for each in copies]
    try:
        result = original(*host_args, **host_kwargs)
    except Exception as problem:  # the original says it in its own words
        return Unserved(f"on the host it fails: {error_text(problem)}")
    if [version_of(each) for each in copies] != written:
        return Unserved("it writes to what it is given")
    return tree_map_only(Tensor, lambda each: returned(each, device), result)


def _is_read(value: Any, device_type: str) -> bool:
    """Integers of the device, which the host is to know."""
    return (
        isinstance(value, Tensor)
        and is_plain(value)
        and value.device.type == device_type
        and not value.is_floating_point()
        and not value.is_complex()
        and not torch.compiler.is_compiling()
    )


def _known(tensor: Tensor) -> Tensor:
    known: Tensor = KnownOnHost(HOST_READS.on_host(tensor).clone(), tensor.device)
    return known


_WAYS: dict[str, Callable[[Callable[..., Any], str], Serve]] = {
    FORWARD: _forward,
    PLACEHOLDERS: _placeholders,
    POSITIONS: _positions,
    PADDING_OF_STATES: _padding,
}
PATCH = Patch("vision_on_host", "vision_on_host", HOST_INTEGERS, find, read_site, bind_site, tunable=False, around=True)
