"""What of attention over pages is checked on a device before it serves a model: lengths within a page and beyond, in
pages that lie anywhere, one of them shared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.attention.paged import PAGED_ATTENTION, Paged
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Case
from npu_patch.serving.implementation import dtype_name

SIZE = 256
LONGEST = (40, 700, 1100)
SEQUENCES = 3


def case(heads: int, key_heads: int, head_dim: int, dtype: torch.dtype) -> Case:
    """Of one kind of layer."""

    def inputs(longest: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        cache = (SEQUENCES * _pages(longest) + 1, SIZE, key_heads, head_dim), dtype
        return [((SEQUENCES, heads, head_dim), dtype), cache, cache]

    def call(function: Callable[..., Any], query: Tensor, keys: Tensor, values: Tensor) -> Any:
        return function(query, keys, values, scattered(len(keys) - 1, query.device, head_dim**-0.5))

    name = f"single queries beside pages, {heads} and {key_heads} heads of {head_dim} {dtype_name(dtype)}"
    return Case(
        PAGED_ATTENTION,
        name,
        inputs,
        call,
        tokens=LONGEST,
        allowed=ALLOWED_OF_PRODUCTS,
        differentiated=False,
        timed_tokens=0,
    )


def scattered(pages: int, device: torch.device | str, scale: float, size: int = SIZE) -> Paged:
    """Sequences of one key, of some and of all that their pages hold but one; the last ones share their first page."""
    each = pages // SEQUENCES
    lengths = (1, each * size // 2 + 1, each * size - 1)
    rows = torch.arange(pages, dtype=torch.int32).flip(0).view(each, SEQUENCES).mT + 1
    rows[-1, 0] = rows[-2, 0]
    return Paged(scale, rows.contiguous().to(device), lengths, torch.tensor(lengths, device=device))


def _pages(longest: int) -> int:
    return -(-longest // SIZE)
