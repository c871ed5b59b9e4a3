"""A device's graph: captured once, replayed in one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

CLASSES = {"npu": "NPUGraph", "cuda": "CUDAGraph"}


@dataclass(frozen=True)
class Graph:
    """`result` is what the step returned when it was captured: its tensors hold what the last replay computed."""

    replay: Callable[[], None]
    result: Any


def new_pool(device_type: str) -> Any:
    return torch.get_device_module(device_type).graph_pool_handle()


def captured(step: Callable[[], Any], device_type: str, pool: Any) -> Graph:
    """Records what `step` launches, and computes nothing of it. Other threads may go on meanwhile."""
    graph = getattr(torch.get_device_module(device_type), CLASSES[device_type])()
    with _casts_within(device_type), capturing(graph, device_type, pool=pool):
        result = step()
    return Graph(graph.replay, result)


@contextlib.contextmanager
def capturing(graph: Any, device_type: str, **options: Any) -> Iterator[None]:
    """The device's own block around a capture. Where that fails, the block leaves its stream current, and torch_npu's
    its dispatch mode in place (2.13: `graph.__exit__` stops at `capture_end`)."""
    backend = torch.get_device_module(device_type)
    before, modes = backend.current_stream(), list(_get_current_dispatch_mode_stack())
    try:
        with backend.graph(graph, capture_error_mode="thread_local", **options):
            yield
    except BaseException:
        while len(left := _get_current_dispatch_mode_stack()) > len(modes):
            left[-1].__exit__(None, None, None)
        backend.set_stream(before)
        raise


@contextlib.contextmanager
def _casts_within(device_type: str) -> Iterator[None]:
    """Autocast keeps copies of weights for as long as its block; a graph outlives it, so it has to make its own."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
