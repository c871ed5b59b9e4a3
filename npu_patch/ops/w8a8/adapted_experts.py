"""Int8 experts with a low-rank adapter for each expert: `x W_e' + s x A_e' B_e'`, before and after the gate.

The products with A and B are grouped ones in the dtype of the tokens, which are kept for their gradients; what is int8
is quantised by row, as without adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.ops.experts.grouped_matmul import (
    NPU_PRODUCTS,
    TORCH_PRODUCTS,
    Grouping,
    Products,
    Weights,
    grouped_matmul,
)
from npu_patch.ops.experts.token_permute import permute, unpermute
from npu_patch.ops.w8a8.experts import TORCH, Int8Experts, Int8Kernels, Int8Weights
from npu_patch.ops.w8a8.experts_npu import NPU

RANKS = 8  # a rank is widened to a multiple of this


class ExpertsAdapter(NamedTuple):
    """`down` (A): `[E, r, K]`; `up` (B): `[E, N, r]`."""

    down: Tensor
    up: Tensor
    scaling: float


Adapters = Sequence[ExpertsAdapter]  # all of which are added


def adapted_experts(
    kernels: Int8Kernels,
    products: Products,
    tokens: Tensor,
    indices: Tensor,
    router_weights: Tensor,
    experts: Int8Experts,
    of_up: Adapters,
    of_down: Adapters,
) -> Tensor:
    """tokens `[N, H]`, indices `[N, k]`, router_weights `[N, k]` -> `[N, H]` in the dtype of tokens."""
    routed = permute(kernels.moves, tokens, indices, experts.up.values.shape[0], False)

    def product(rows: Tensor, weights: Int8Weights, adapters: Adapters) -> Tensor:
        y: Tensor = _Product.apply(kernels, rows, routed.grouping.counts, weights.values, weights.scale)
        for adapter in adapters:
            y = y + _through_adapter(products, rows, adapter, routed.grouping)
        return y

    hidden = (experts.gate or kernels.swiglu)(product(routed.rows, experts.up, of_up))
    rows = product(hidden, experts.down, of_down)
    return unpermute(kernels.moves, rows, routed.positions, router_weights)


def _through_adapter(products: Products, rows: Tensor, adapter: ExpertsAdapter, grouping: Grouping) -> Tensor:
    down, up = (each.to(rows.dtype) for each in (adapter.down, adapter.up))
    more = -down.shape[1] % RANKS  # of zeros: grouped products take rows of a multiple of 16 bytes
    if more:
        down, up = F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more))
    down, up = down.contiguous(), up.contiguous()
    shrunk = grouped_matmul(products, rows, Weights((down,), transposed=True), grouping)
    return grouped_matmul(products, shrunk, Weights((up,), transposed=True), grouping) * adapter.scaling


class _Product(torch.autograd.Function):
    """Rows quantised, times int8 weights; with the gradient of the rows, straight through the rounding."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        kernels, rows, counts, values, scale = given
        ctx.kernels = kernels
        ctx.save_for_backward(*((counts, values, scale) if ctx.needs_input_grad[1] else ()))
        y: Tensor = kernels.product(kernels.quantise(rows), Int8Weights(values, scale), counts, rows.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        counts, values, scale = ctx.saved_tensors
        return None, ctx.kernels.through(dy.contiguous(), Int8Weights(values, scale), counts), None, None, None


# By the name of the implementation that serves the same experts without adapters.
ADAPTED = {
    "torch_npu.npu_grouped_matmul of int8": partial(adapted_experts, NPU, NPU_PRODUCTS),
    "torch, int32 sums": partial(adapted_experts, TORCH, TORCH_PRODUCTS),
}
