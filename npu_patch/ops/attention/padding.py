"""Attention over wider heads: zeros beside q and k add nothing to a score, zeros beside v columns that are cut off.

The cube unit multiplies tiles, and vision towers have heads of 72 or 80. Serving engines pad them, 80 to 128, or two
halves of 40 to 64 (https://github.com/sgl-project/sglang/pull/10337). Each call is then three copies in and one out,
and as many back, which pays where the scores are many: so it is measured, at two widths to choose from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.fusion import IMPLEMENTATION, WIDEST_HEAD
from npu_patch.serving.implementation import Implementation

Width = Callable[[int], int]


def power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()


def multiple_of_32(width: int) -> int:
    return -(-width // 32) * 32


def _attention(wider: Width, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """`[B, Sq, N, Dv]`, contiguous; packed `[T, N, Dv]`."""
    width = wider(query.shape[-1])
    wide_value = _padded(value, wider(value.shape[-1]))
    out = IMPLEMENTATION.run(_padded(query, width), _padded(key, width), wide_value, attention)
    return out[..., : value.shape[-1]].contiguous()


def _padded(heads: Tensor, width: int) -> Tensor:
    """`[B, N, S, D]` are `[B, S, N, D]` in memory, as projections are: the result then needs no other copy."""
    if heads.shape[-1] == width:
        return heads
    zeros = (0, width - heads.shape[-1])
    return F.pad(heads, zeros) if heads.dim() == 3 else F.pad(heads.transpose(1, 2), zeros).transpose(1, 2)


def _unsupported(wider: Width, query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> str | None:
    width, value_width = query.shape[-1], value.shape[-1]
    wide = wider(width)
    if (wide, wider(value_width)) == (width, value_width):
        return f"heads of {width} need no zeros"
    if wider is not power_of_two and wide == power_of_two(width):
        return f"heads of {width}: the next power of two is as wide"
    if wide > WIDEST_HEAD:
        return f"heads of {width} would be {wide} wide, the operator takes {WIDEST_HEAD}"
    if attention.decodes:
        return "a single query: all keys of the cache would be copied"
    return IMPLEMENTATION.unsupported(query, key, value, attention)


PADDED = tuple(
    Implementation(
        f"{IMPLEMENTATION.name}, heads padded to {words}",
        IMPLEMENTATION.device_types,
        partial(_attention, wider),
        partial(_unsupported, wider),
        IMPLEMENTATION.missing,
        optional=True,
    )
    for words, wider in (("a power of two", power_of_two), ("a multiple of 32", multiple_of_32))
)
