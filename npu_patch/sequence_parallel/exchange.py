"""Heads for tokens, between the ranks that share each sequence, and back: an all_to_all_single each."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def to_tokens(x: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """`[B, N, S/P, D]` -> `[B, N/P, S, D]`. One copy, in the order in which it is sent; with one row, none after."""
    rows, heads, tokens, size = x.shape
    apart = x.transpose(1, 2).reshape(rows, tokens, ranks, heads // ranks, size)
    got = _exchanged(apart.permute(2, 0, 1, 3, 4).contiguous(), group)
    return got.transpose(0, 1).reshape(rows, tokens * ranks, heads // ranks, size).transpose(1, 2)


def to_heads(out: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    """`[B, S, N/P, D]` -> `[B, S/P, N, D]`."""
    rows, tokens, heads, size = out.shape
    apart = out.reshape(rows, ranks, tokens // ranks, heads, size)
    got = _exchanged(apart.transpose(0, 1).contiguous(), group)
    return got.permute(1, 2, 0, 3, 4).reshape(rows, tokens // ranks, heads * ranks, size)


def _exchanged(parts: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    got: Tensor = _Exchange.apply(parts, group)
    return got


class _Exchange(torch.autograd.Function):
    """`[P, ...]`: to each rank its part, and one from each."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        got = torch.empty_like(parts)
        dist.all_to_all_single(got, parts, group=group)
        return got

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Exchange.apply(grad.contiguous(), ctx.group), None
