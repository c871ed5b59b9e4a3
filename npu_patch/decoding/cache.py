"""What a static cache keeps: addresses that a graph may know, and what the host counts beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FINEST = 64
MOST_WINDOWS = 8
GROWING = ("keys", "values")  # of one position each step, which a step that is run again writes again


def why_not(cache: Any) -> str | None:
    """Why no graph can write to the cache."""
    kind = _class("StaticCache")
    if cache is None:
        return "no cache"
    if kind is None or not isinstance(cache, kind):
        return f"a cache that grows ({type(cache).__name__})"
    if getattr(cache, "offloading", False):
        return "a cache that is offloaded"
    return None


def is_for_one_call(cache: Any, implementation: str | None, model: Any) -> bool:
    """Whether generate() made it for this call, so that nobody misses it. It takes no cache of a caller's where it is
    asked for an `implementation`; and older versions of transformers keep what they made."""
    fresh = not any(vars(layer).get("keys") is not None for layer in cache.layers)
    kept = implementation is None or getattr(model, "_cache", None) is cache
    return type(cache) is _class("StaticCache") and fresh and not kept


def length_of(cache: Any) -> int:
    """The tokens that it has room for."""
    return max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)


def bucket(length: int) -> int:
    """As long as caches are made for this length, so that other lengths find them: four to each power of two."""
    step = max(FINEST, 1 << max((length - 1).bit_length() - 3, 0))
    return -(-length // step) * step


def made(config: Any, length: int) -> Any:
    """One that is kept; or why there is none. Its windows do not slide: masks hide what has left a window, and the host
    would count each token of a cache that lets it go."""
    kind, full, sliding = _class("StaticCache"), _class("StaticLayer"), _class("StaticSlidingWindowLayer")
    assert kind is not None and full is not None
    cache = kind(config=config, max_cache_len=length)
    for index, layer in enumerate(cache.layers):
        if type(layer) is sliding:
            window: int = vars(layer)["max_cache_len"]
            if length > MOST_WINDOWS * window:
                return f"windows of less than 1 / {MOST_WINDOWS} of the cache"
            cache.layers[index] = full(max_cache_len=length)
            cache.layers[index].is_sliding = True  # by which models know which mask is its
    return cache


def start_over(cache: Any) -> None:
    """As if it were new, at the addresses that it has. A new cache says that it is empty without asking the device."""
    cache.reset()
    for layer in cache.layers:
        if vars(layer).get("keys") is not None:
            layer.is_initialized = False
            layer.lazy_initialization = _Again(layer)


@dataclass
class _Again:
    """The first update of a layer that has its memory already."""

    layer: Any

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        del self.layer.lazy_initialization
        self.layer.is_initialized = True


@dataclass(frozen=True)
class Before:
    """A cache as it was before a step. `on_host`: of each layer. `on_device`: copies of what a step changes, but for
    keys and values: a step that is run again writes those at the same place again."""

    on_host: tuple[dict[str, Any], ...]
    on_device: tuple[tuple[Tensor, Tensor], ...]

    @classmethod
    def of(cls, cache: Any) -> Before:
        kept = tuple((tensor, tensor.clone()) for layer in cache.layers for tensor in _changing(layer))
        return cls(_on_host(cache), kept)

    def put_back(self, cache: Any) -> None:
        for layer, before in zip(cache.layers, self.on_host, strict=True):
            vars(layer).clear()
            vars(layer).update({name: _copied(value) for name, value in before.items()})
        for tensor, value in self.on_device:
            tensor.copy_(value)

    def counted_by_the_host(self, cache: Any) -> str | None:
        """What a step changed that a replay would not: numbers of the host, or which tensors there are."""
        for layer, before in zip(cache.layers, self.on_host, strict=True):
            now = vars(layer)
            for name in {*now, *before}:
                if not _same(now.get(name), before.get(name)):
                    return f"{type(layer).__name__}.{name} changes on the host with each token"
        return None


def _class(name: str) -> type | None:
    found = getattr(sys.modules.get("transformers.cache_utils"), name, None)
    return found if isinstance(found, type) else None


def _on_host(cache: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: _copied(value) for name, value in vars(layer).items()} for layer in cache.layers)


def _copied(value: Any) -> Any:
    return dict(value) if isinstance(value, dict) else list(value) if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return one is other
    return one is other or bool(one == other)


def _changing(layer: Any) -> Iterator[Tensor]:
    for name, value in vars(layer).items():
        if name not in GROWING:
            each = value.values() if isinstance(value, dict) else (value,)
            yield from (tensor for tensor in each if isinstance(tensor, Tensor))


def addresses(cache: Any) -> tuple[int, ...]:
    """Of all its tensors."""
    found = []
    for layer in cache.layers:
        for value in vars(layer).values():
            each = value.values() if isinstance(value, dict) else (value,)
            found += [tensor.data_ptr() for tensor in each if isinstance(tensor, Tensor)]
    return tuple(found)


def tokens_in(cache: Any) -> int:
    """Waits for the device, where it is one that counts."""
    seen = cache.get_seq_length()
    return int(seen.item() if isinstance(seen, torch.Tensor) else seen)
