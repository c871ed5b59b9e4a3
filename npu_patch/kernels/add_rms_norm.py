"""The residual's sum and its RMSNorm in one launch forward and one backward; also RMSNorm alone.

A decoder layer adds to the residual stream and normalizes the sum. Together they read two rows and write two; the
backward reads two rows and the stream's gradient and writes one, which is the gradient of both addends. All is
float32 inside: the norm is of the sum before it is rounded. Kept for the backward: the rounded sum, whose rstd it
computes anew.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.kernels import launch
from npu_patch.kernels.gamma import WEIGHT, Gamma
from npu_patch.kernels.load_gamma import load_gamma
from npu_patch.kernels.partial_sums import weight_gradient
from npu_patch.kernels.rows import row_tiling, rows_of
from npu_patch.numerics.autograd import Context

FORWARD = launch.Tile(bytes_per_element=24, elements=2048, stages=3, least_bytes=15)
BACKWARD = launch.Tile(bytes_per_element=32, elements=4096, programs=3, stages=2, least_bytes=23)
TILES = (FORWARD, BACKWARD)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, gamma: Gamma = WEIGHT
) -> tuple[Tensor, Tensor]:
    """RMSNorm(x + residual) and x + residual, for x and residual `[..., D]` of one dtype and weight `[D]`.

    `gamma` has a kernel, `eps` is positive.
    """
    return _AddRMSNorm.apply(x, residual, weight, eps, gamma)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gamma: Gamma = WEIGHT) -> Tensor:
    """RMSNorm of x `[..., D]` alone, in its dtype."""
    return _RMSNorm.apply(x, weight, eps, gamma)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, gamma: Gamma
    ) -> tuple[Tensor, Tensor | None]:
        y, total = forward(x, residual, weight, eps, gamma)
        ctx.save_for_backward(total, weight)
        ctx.set_materialize_grads(False)
        ctx.norm = eps, gamma
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, needs_weight = ctx.needs_input_grad[:3]
        if dy is None:
            dx, d_weight = d_total, None
        else:
            (total, weight), (eps, gamma) = ctx.saved_tensors, ctx.norm
            dx, d_weight = backward(dy, d_total, total, weight, eps, gamma, needs_x or needs_residual, needs_weight)
        return (dx if needs_x else None), (dx if needs_residual else None), d_weight, None, None


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor | None, eps: float, gamma: Gamma) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.norm = eps, gamma
        return forward(x, None, weight, eps, gamma)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy, None, *ctx.saved_tensors, *ctx.norm, *ctx.needs_input_grad[:2]), None, None


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, gamma: Gamma
) -> tuple[Tensor, Tensor | None]:
    rows = rows_of(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    residual_rows = None if residual is None else rows_of(residual)
    grid, tiling = row_tiling(rows, FORWARD)
    launch.launch(
        _forward, x.device, grid,
        rows, residual_rows, weight, y, total,
        rows.shape[0], rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), eps,
        GAMMA=gamma.kernel, ADDS=residual is not None, D=rows.shape[1], **tiling,
    )  # fmt: skip
    return y, total


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gamma: Gamma,
    needs_x: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x, to which that of the stream is added, and of the weight."""
    rows, dy_rows, total_rows = rows_of(x), rows_of(dy), None if d_total is None else rows_of(d_total)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    grid, tiling = row_tiling(rows, BACKWARD, needs_weight)
    partial = torch.empty(grid, rows.shape[1], dtype=torch.float32, device=x.device) if needs_weight else None
    launch.launch(
        _backward, x.device, grid,
        dy_rows, total_rows, rows, weight, dx, partial,
        rows.shape[0], dy_rows.stride(0), 0 if total_rows is None else total_rows.stride(0), rows.stride(0), eps,
        GAMMA=gamma.kernel, ADDS=d_total is not None, NEEDS_X=needs_x, NEEDS_WEIGHT=needs_weight, D=rows.shape[1],
        **tiling,
    )  # fmt: skip
    return dx, weight_gradient(partial, weight, gamma)


@triton.jit
def _forward(
    x, residual, weight, y, total,
    rows, x_row, residual_row, eps,
    GAMMA: tl.constexpr, ADDS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)
    if GAMMA > 0:
        gamma = load_gamma(weight, column, column < D, GAMMA)[None, :]
    column = column[None, :]
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block * BLOCK, tl.int64)
        inside = (row < rows - block * BLOCK) & (column < D)
        a = tl.load(x + first * x_row + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        if ADDS:
            here = residual + first * residual_row + row * residual_row + column
            a += tl.load(here, mask=inside, other=0.0).to(tl.float32)
            tl.store(total + first * D + row * D + column, a, mask=inside)
        rstd = tl.rsqrt(tl.sum(a * a, 1) * (1.0 / D) + eps)
        a = a * rstd[:, None]
        if GAMMA > 0:
            a = a * gamma
        tl.store(y + first * D + row * D + column, a, mask=inside)


@triton.jit
def _backward(
    dy, d_total, x, weight, dx, partial,
    rows, dy_row, d_total_row, x_row, eps,
    GAMMA: tl.constexpr, ADDS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With n = x * rstd: d gamma = sum dy n, dx = d total + rstd (dy gamma - n mean(dy gamma n))."""
    row = tl.arange(0, BLOCK)[:, None]
    column = tl.arange(0, BLOCK_D)
    if GAMMA > 0:
        gamma = load_gamma(weight, column, column < D, GAMMA)[None, :]
    column = column[None, :]
    sums = tl.zeros([BLOCK_D], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block * BLOCK, tl.int64)
        inside = (row < rows - block * BLOCK) & (column < D)
        n = tl.load(x + first * x_row + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + first * dy_row + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(n * n, 1) * (1.0 / D) + eps)[:, None]
        n = n * rstd
        if NEEDS_WEIGHT:
            sums += tl.sum(d * n, 0)
        if NEEDS_X:
            if GAMMA > 0:
                d = d * gamma
            mean = (tl.sum(d * n, 1) * (1.0 / D))[:, None]
            d = rstd * (d - n * mean)
            if ADDS:
                here = d_total + first * d_total_row + row * d_total_row + column
                d += tl.load(here, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + first * D + row * D + column, d, mask=inside)
    if NEEDS_WEIGHT:
        place = tl.arange(0, BLOCK_D)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + place, sums, mask=place < D)
