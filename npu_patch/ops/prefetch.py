"""The weights of the next products read into the L2 cache while attention runs: `npu_prefetch`, on a stream of its own.

A decoded token reads each weight once, so products wait for the memory; a single query's attention, and what is around
it, leaves the memory idle for a while. Nothing is computed: a wrong guess of what comes next costs time only.

The operator's `dependency` is for torchair's graphs and has no effect elsewhere (its documentation), so the order is
that of streams: the prefetch begins when the query is there, for its stream waits for the caller's; the caller's waits
for it before it goes on, so that none runs after its weight was used. In a graph that is a fork, which is joined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Linear, Module

from npu_patch.serving.operators import Operator

OPERATOR = Operator("npu_prefetch")
MOST_BYTES = 18 << 20  # of one weight: what vllm-ascend and sglang fetch
SHARE = 4  # of the L2 cache, which attention's keys and values are in too, all of it together takes one in so many
MOST_ROWS = 64  # more of them compute longer than they wait for the memory

# What follows an attention layer, in order.
FOLLOWING: WeakKeyDictionary[Module, tuple[Linear, ...]] = WeakKeyDictionary()
_STREAMS: dict[torch.device, Any] = {}


def while_fetching(serve: Callable[..., Any], module: Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`serve(module, query, ...)`, query `[B, N, Sq, D]`, beside what fetches the weights that follow the module."""
    following = FOLLOWING.get(module)
    if following is None or not _is_token(query):
        return serve(module, query, *args, **kwargs)
    current, side = torch.get_device_module("npu").current_stream(query.device), stream(query.device)
    side.wait_stream(current)
    with torch.get_device_module("npu").stream(side):
        _fetch(following, query.device)
    try:
        return serve(module, query, *args, **kwargs)
    finally:
        current.wait_stream(side)


def _is_token(query: Tensor) -> bool:
    """Whether it is one token of each of a few sequences, of generation: nothing can be differentiated."""
    return (
        query.device.type == "npu"
        and query.dim() == 4
        and query.shape[2] == 1
        and query.shape[0] <= MOST_ROWS
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    )


def _fetch(following: tuple[Linear, ...], device: torch.device) -> None:
    left = budget(device)
    for linear in following:
        weight = linear._parameters.get("weight")
        if weight is None or weight.device != device or not weight.numel() or not left:
            return
        most = min(MOST_BYTES, left, weight.numel() * weight.element_size())
        torch.ops.npu.npu_prefetch(weight, None, most)
        left -= most


@functools.cache
def budget(device: torch.device) -> int:
    """Bytes that one attention fetches at most."""
    return int(torch.get_device_module("npu").get_device_properties(device).L2_cache_size) // SHARE


def stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = torch.get_device_module("npu").Stream(device)
    return _STREAMS[device]
