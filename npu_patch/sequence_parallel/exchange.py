"""Heads for tokens, between the ranks that share each sequence, and back: an all_to_all_single each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def to_tokens(x: Tensor, ranks: int, group: Group) -> Tensor:
    """`[B, N, S/P, D]` -> `[B, N/P, S, D]`. One copy, in the order in which it is sent; with one row, none after."""
    return together_to_tokens([x.transpose(1, 2)], ranks, group)[0].transpose(1, 2)


def together_to_tokens(tensors: Sequence[Tensor], ranks: int, group: Group) -> list[Tensor]:
    """Each `[B, S/P, N, *]` -> `[B, S, N/P, *]`: one exchange for those of one dtype."""
    found: dict[int, Tensor] = {}
    for dtype in {tensor.dtype: None for tensor in tensors}:
        own = {i: tensor for i, tensor in enumerate(tensors) if tensor.dtype == dtype}
        apart = [each.reshape(*each.shape[:2], ranks, -1).permute(2, 0, 1, 3) for each in own.values()]
        got = _exchanged(torch.cat(apart, -1).contiguous(), group).transpose(0, 1)  # [B, P, S/P, *]
        parts = got.reshape(got.shape[0], -1, got.shape[-1]).split([each.shape[-1] for each in apart], -1)
        for (i, tensor), part in zip(own.items(), parts, strict=True):
            found[i] = part.reshape(*part.shape[:2], tensor.shape[2] // ranks, *tensor.shape[3:])
    return [found[i] for i in range(len(tensors))]


def to_heads(out: Tensor, ranks: int, group: Group) -> Tensor:
    """`[B, S, N/P, D]` -> `[B, S/P, N, D]`."""
    rows, tokens, heads, size = out.shape
    apart = out.reshape(rows, ranks, tokens // ranks, heads, size)
    got = _exchanged(apart.transpose(0, 1).contiguous(), group)
    return got.permute(1, 2, 0, 3, 4).reshape(rows, tokens // ranks, heads * ranks, size)


def from_the_rank_before(tail: Tensor, group: Group) -> Tensor:
    """What that rank gives here; zeros on the first."""
    got: Tensor = _FromTheRankBefore.apply(tail, group)
    return got


def _exchanged(parts: Tensor, group: Group) -> Tensor:
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


class _FromTheRankBefore(torch.autograd.Function):
    """One node on each rank, so that all of them take part in the backward."""

    @staticmethod
    def forward(ctx: Any, tail: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _shifted(tail, 1, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _shifted(grad, -1, ctx.group), None


def _shifted(x: Tensor, by: int, group: Group) -> Tensor:
    """To the rank that comes `by` later; zeros where none came."""
    ranks, rank = range(dist.get_world_size(group)), dist.get_rank(group)
    got, given = torch.zeros(x.shape, dtype=x.dtype, device=x.device), x.contiguous()
    taken, sent = ([x.numel() * (other == rank + to) for other in ranks] for to in (-by, by))
    dist.all_to_all_single(got.view(-1)[: sum(taken)], given.view(-1)[: sum(sent)], taken, sent, group=group)
    return got
