"""A device's graph: captured once, replayed in one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

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
    backend = torch.get_device_module(device_type)
    graph = getattr(backend, CLASSES[device_type])()
    with _casts_within(device_type), backend.graph(graph, pool=pool, capture_error_mode="thread_local"):
        result = step()
    return Graph(graph.replay, result)


@contextlib.contextmanager
def _casts_within(device_type: str) -> Iterator[None]:
    """Autocast keeps copies of weights for as long as its block; a graph outlives it, so it has to make its own."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
