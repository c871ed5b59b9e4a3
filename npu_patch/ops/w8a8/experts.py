"""Routed experts whose weights are int8: tokens quantised once, before they are copied to their experts.

    q, s   = by token of x                                   int8, copied to the experts with their scales
    u      = (q @ up.T) * scale * s                          sums in int32
    q', s' = by row of silu(u[:, :I]) * u[:, I:]             in float32
    y[t]   = sum over j of router_weights[t, j] * (q' @ down.T) * scale * s'

Only tokens and router weights have gradients: weights are frozen. Kept for the backward are the int8 tokens; it makes u
again by the int8 product, and turns weights into the dtype of the gradient in slices, none of which is kept. Rounding
to int8 counts as if it were none (straight-through).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.numerics.results import changeable
from npu_patch.ops.experts.token_permute import TORCH_MOVES, Moves
from npu_patch.ops.swiglu import reference as silu_times
from npu_patch.ops.swiglu import torch_swiglu
from npu_patch.ops.w8a8.linear import TORCH_INT8, through
from npu_patch.ops.w8a8.quantised import Quantised, by_token

REGISTERED = "w8a8"  # what a configuration calls them
Gate = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Int8Weights:
    """`values`: int8 `[E, N, K]`, as they are stored or a transposed view; `scale`: `[E, N]`."""

    values: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Int8Experts:
    """The experts of one layer at one call. `gate`: from `[M, N]` of `up` to `[M, I]`, None for silu(first half) *
    second half."""

    up: Int8Weights
    down: Int8Weights
    gate: Gate | None = None


@dataclass(frozen=True)
class Int8Kernels:
    """What a device computes them with. Rows are sorted by expert; `counts`, int64 `[E]`, says how many each has.

    `by_expert(tokens, indices [N, k])`: the rows `[N * k]` and their positions. `product(rows, weights, counts, dtype)`
    is `[M, N]`, `gated(rows, up, counts, dtype)` the quantised SwiGLU of such a product, `through(dy [M, N], weights,
    counts)` `[M, K]`, the gradient of its rows. `swiglu` is differentiable.
    """

    quantise: Callable[[Tensor], Quantised]
    moves: Moves
    by_expert: Callable[[Quantised, Tensor], tuple[Quantised, Tensor]]
    product: Callable[[Quantised, Int8Weights, Tensor, torch.dtype], Tensor]
    gated: Callable[[Quantised, Int8Weights, Tensor, torch.dtype], Quantised]
    swiglu: Gate
    through: Callable[[Tensor, Int8Weights, Tensor], Tensor]


def int8_experts(
    kernels: Int8Kernels, tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts
) -> Tensor:
    """tokens `[N, H]`, indices `[N, k]`, router_weights `[N, k]` -> `[N, H]` in the dtype of tokens."""
    up, down = experts.up, experts.down
    return _Int8Experts.apply(
        kernels, experts.gate, tokens, router_weights, indices, up.values, up.scale, down.values, down.scale
    )


class _Int8Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        kernels, gate, tokens, router_weights, indices, *weights = given
        up, down = Int8Weights(*weights[:2]), Int8Weights(*weights[2:])
        counts = kernels.moves.counts(indices, up.values.shape[0])
        quantised = kernels.quantise(tokens)
        ctx.kernels, ctx.gate, ctx.dtype = kernels, gate, tokens.dtype
        _, _, *needed = ctx.needs_input_grad[:4]
        ctx.save_for_backward(*((*quantised, router_weights, indices, counts, *weights) if any(needed) else ()))
        rows, positions = kernels.by_expert(quantised, indices)
        if gate is None:
            hidden = kernels.gated(rows, up, counts, tokens.dtype)
        else:
            hidden = kernels.quantise(gate(kernels.product(rows, up, counts, tokens.dtype)))
        y = kernels.product(hidden, down, counts, tokens.dtype)
        return changeable(kernels.moves.unpermute(y, positions, router_weights.to(y.dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        values, scale, router_weights, indices, counts, *weights = ctx.saved_tensors
        kernels, up, down = ctx.kernels, Int8Weights(*weights[:2]), Int8Weights(*weights[2:])
        _, _, tokens_needed, router_needed, *_ = ctx.needs_input_grad
        rows, positions = kernels.by_expert(Quantised(values, scale), indices)
        places, choices = positions.long(), router_weights.flatten()
        d_rows, _ = kernels.moves.permute(dy.contiguous(), indices)
        d_hidden = kernels.through(d_rows, down, counts)
        with torch.enable_grad():
            u = kernels.product(rows, up, counts, ctx.dtype).requires_grad_(tokens_needed)
            hidden = (ctx.gate or kernels.swiglu)(u)
        d_tokens = d_router = None
        if router_needed:  # a row times dy is what it was made of, times what dy makes of its weights
            rounded = kernels.quantise(hidden.detach())
            of_rows = (rounded.values.float() * d_hidden.float()).sum(-1) * rounded.scale
            d_router = of_rows[places].view_as(indices).to(router_weights.dtype)
        if tokens_needed:
            weight_of_row = torch.empty_like(choices).scatter_(0, places, choices)[:, None].to(d_hidden.dtype)
            (du,) = torch.autograd.grad(hidden, u, d_hidden * weight_of_row)
            d_rows = kernels.through(du, up, counts)
            d_tokens = kernels.moves.unpermute(d_rows, positions, torch.ones_like(indices, dtype=d_rows.dtype))
        return None, None, d_tokens, d_router, *[None] * 5


def _spans(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """Of experts that have rows. The host reads how many: torch has no grouped product of int8."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _torch_by_expert(tokens: Quantised, indices: Tensor) -> tuple[Quantised, Tensor]:
    values, positions = TORCH_MOVES.permute(tokens.values, indices)
    return Quantised(values, TORCH_MOVES.permute(tokens.scale, indices)[0]), positions


def _torch_product(rows: Quantised, weights: Int8Weights, counts: Tensor, dtype: torch.dtype) -> Tensor:
    y = torch.empty(len(rows.scale), weights.scale.shape[1], dtype=dtype, device=rows.scale.device)
    for expert, span in _spans(counts):
        own = Quantised(rows.values[span], rows.scale[span])
        y[span] = TORCH_INT8.product(own, weights.values[expert], weights.scale[expert], None, dtype)
    return y


def _torch_gated(rows: Quantised, up: Int8Weights, counts: Tensor, dtype: torch.dtype) -> Quantised:
    return by_token(silu_times(_torch_product(rows, up, counts, torch.float32)))


def _torch_through(dy: Tensor, weights: Int8Weights, counts: Tensor) -> Tensor:
    dx = dy.new_empty(len(dy), weights.values.shape[2])
    for expert, span in _spans(counts):
        dx[span] = through(dy[span], weights.values[expert], weights.scale[expert])
    return dx


TORCH = Int8Kernels(by_token, TORCH_MOVES, _torch_by_expert, _torch_product, _torch_gated, torch_swiglu, _torch_through)
