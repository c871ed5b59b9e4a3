"""Moving tokens to their experts and back.

`permute` repeats each token once for each of its experts, sorted by expert; `unpermute` sums a token's rows, each times
its router weight. Each is the other's adjoint.

Expert parallelism: an index equal to the number of experts means "not on this rank". Such a slot's row is sorted behind
all others, where no product reads or writes it. It is given a position beyond the rows, which the operators take as
dropped: it counts as zero in the sum and receives no gradient, whatever stands in rows that nobody has written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.ops.experts.grouped_matmul import Grouping
from npu_patch.serving.operators import Operator

MOST_EXPERTS_PER_TOKEN = 512
NPU_PERMUTE = Operator("npu_moe_token_permute")  # _Permute is its derivative
NPU_UNPERMUTE = Operator("npu_moe_token_unpermute", gradient=True)


@dataclass(frozen=True)
class Moves:
    """The two moves of one device. `positions` is int32 `[N * k]`: the row that each (token, choice) is in.

    `permute(tokens [N, H], indices [N, k])` is the rows `[N * k, H]` and their positions. `unpermute(rows, positions,
    router_weights [N, k])` is `[N, H]`, summed in float32, differentiable in rows and router weights. `counts(indices,
    experts)` is how many of them are 0, 1, ... experts - 1: int64 `[experts]`, without waiting for the device.
    """

    permute: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    unpermute: Callable[[Tensor, Tensor, Tensor], Tensor]
    counts: Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Routed:
    """Rows sorted by expert, where they are, and how many each expert has. `beyond()`: bool `[M, 1]`, true for rows
    that belong to no expert here; None where there can be none."""

    rows: Tensor
    positions: Tensor
    grouping: Grouping
    beyond: Callable[[], Tensor] | None


def permute(moves: Moves, tokens: Tensor, indices: Tensor, experts: int, sentinels: bool) -> Routed:
    """tokens `[N, H]`, indices `[N, k]`, int32 or int64. `sentinels`: an index may be `experts` or more."""
    rows, positions = _Permute.apply(moves, tokens, indices, experts if sentinels else None)
    counts = moves.counts(indices, experts)

    def groups() -> Tensor:
        return indices.flatten().long().sort(stable=True).values

    def beyond() -> Tensor:
        return (torch.arange(rows.shape[0], device=rows.device) >= counts.sum())[:, None]

    return Routed(rows, positions, Grouping(counts, groups), beyond if sentinels else None)


def unpermute(moves: Moves, rows: Tensor, positions: Tensor, router_weights: Tensor) -> Tensor:
    # In the dtype of the rows: the gradient kernel was seen to give NaN for float32 weights of bfloat16 rows.
    # Always with weights: without them the operator moves rows and does not sum.
    return moves.unpermute(rows, positions, router_weights.to(rows.dtype))


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moves: Moves, tokens: Tensor, indices: Tensor, sentinels_from: int | None
    ) -> tuple[Tensor, Tensor]:
        rows, positions = moves.permute(tokens, indices)
        if sentinels_from is not None:
            positions = positions.masked_fill(indices.flatten() >= sentinels_from, rows.shape[0])
        ctx.moves, ctx.choices = moves, indices.shape
        ctx.save_for_backward(positions)
        ctx.mark_non_differentiable(positions)
        return rows, positions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor, _: Any) -> tuple[Any, ...]:
        (positions,) = ctx.saved_tensors
        ones = d_rows.new_ones(ctx.choices)
        return None, ctx.moves.unpermute(d_rows.contiguous(), positions, ones), None, None


def _npu_permute(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.npu.npu_moe_token_permute(tokens, indices)


def _npu_unpermute(rows: Tensor, positions: Tensor, router_weights: Tensor) -> Tensor:
    return torch.ops.npu.npu_moe_token_unpermute(rows, positions, router_weights)


def _npu_counts(indices: Tensor, experts: int) -> Tensor:
    # bincount waits twice; a histogram of whole numbers is one kernel. Its range ends at the last expert, so that
    # sentinels are outside; with one expert there is no range.
    if experts == 1:
        return (indices < 1).sum().view(1)
    return torch.histc(indices.flatten(), bins=experts, min=0, max=experts - 1).long()


def _torch_permute(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    order = indices.flatten().argsort(stable=True)
    return tokens[order // indices.shape[1]], order.argsort().int()


class _TorchUnpermute(torch.autograd.Function):
    """As products of k router weights and k rows, which add up in float32: no float32 copy of the rows is made."""

    @staticmethod
    def forward(rows: Tensor, positions: Tensor, router_weights: Tensor) -> Tensor:
        return torch.bmm(router_weights[:, None], _rows_of_tokens(rows, positions, router_weights))[:, 0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows, positions, router_weights = ctx.saved_tensors
        d_rows = d_weights = None
        if ctx.needs_input_grad[0]:
            d_rows = rows.new_zeros(rows.shape[0] + 1, rows.shape[1])  # the last one takes what was dropped
            d_rows[positions] = (dy[:, None] * router_weights[..., None]).flatten(0, 1)
            d_rows = d_rows[:-1]
        if ctx.needs_input_grad[2]:
            d_weights = torch.bmm(_rows_of_tokens(rows, positions, router_weights), dy[..., None])[..., 0]
        return d_rows, None, d_weights


def _rows_of_tokens(rows: Tensor, positions: Tensor, router_weights: Tensor) -> Tensor:
    """`[N, k, H]`, zero where a row was dropped."""
    kept = positions < rows.shape[0]
    own = rows[positions.clamp(max=rows.shape[0] - 1)].masked_fill(~kept[:, None], 0.0)
    return own.unflatten(0, router_weights.shape)


def _torch_counts(indices: Tensor, experts: int) -> Tensor:
    ids = indices.flatten().long().clamp(max=experts)  # the last bin takes the sentinels; histc of integers: no CPU
    return ids.new_zeros(experts + 1).scatter_add_(0, ids, torch.ones_like(ids))[:-1]


NPU_MOVES = Moves(_npu_permute, _npu_unpermute, _npu_counts)
TORCH_MOVES = Moves(_torch_permute, _TorchUnpermute.apply, _torch_counts)
