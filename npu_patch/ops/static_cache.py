"""One token's keys and values written to a cache of fixed size, at the place that the cache counts on the device.

A call is the cache's keys `[B, N, S, D]`, its values, and the number of tokens in it, an integer tensor of one element;
and the token's key and value `[B, N, 1, D]`. Nothing is returned: all three of the cache are changed in place, so that
their addresses stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.serving.implementation import Implementation, is_plain, layout
from npu_patch.serving.op import Op


def write(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    """The count is the place: neither is made anew."""
    place = length.view(1)
    keys.index_copy_(2, place, key)
    values.index_copy_(2, place, value)
    length.add_(1)


def _unsupported(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> str | None:
    tensors = keys, values, length, key, value
    if not all(map(is_plain, tensors)):
        return "tensor subclass"
    if length.numel() != 1 or length.dtype != torch.int64:
        return f"a count of {length.dtype}, {layout(length)}"
    for cached, one in ((keys, key), (values, value)):
        if one.dim() != 4 or one.shape[2] != 1:
            return "more tokens than one"
        if cached.dtype != one.dtype or cached.shape[:2] != one.shape[:2] or cached.shape[3] != one.shape[3]:
            return f"a token of {one.dtype}, {layout(one)}, for a cache of {cached.dtype}, {layout(cached)}"
    if len({tensor.device for tensor in tensors}) > 1:
        return "a cache on several devices"
    # A backward would want the place as it was.
    return "gradients" if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors) else None


def _key(keys: Tensor, values: Tensor, length: Tensor, key: Tensor, value: Tensor) -> None:
    """There is one way."""


STATIC_CACHE: Op[[Tensor, Tensor, Tensor, Tensor, Tensor], None] = Op(
    "static cache", (Implementation("torch, at the count", ("npu", "cuda", "cpu"), write, _unsupported),), _key, write
)
