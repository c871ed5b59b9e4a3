"""The gates of a gated delta net, `g = -exp(A_log) softplus(a + dt_bias)` and `beta = sigmoid(b)`, in one launch.

The reference is `npu_patch.ops.delta_gating`. g is the logarithm of a decay, in float32 whatever the dtypes
(https://arxiv.org/abs/2412.06464). Kept for the backward: the arguments.

No patch uses it: a layer computes its gates in the middle of its forward, where nothing can be rebound. It is for
layers that call it, and `scripts/bench_kernels.py` times it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from npu_patch.kernels import launch
from npu_patch.kernels.partial_sums import sum_rows
from npu_patch.kernels.rows import row_tiling, rows_of

FORWARD = launch.Tile(bytes_per_element=48, elements=1024)
BACKWARD = launch.Tile(bytes_per_element=64, elements=1024)


def delta_gating(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g float32 `[..., H]` and beta `[..., H]` in the dtype of b, for a and b `[..., H]`, a_log and dt_bias `[H]`."""
    return _DeltaGating.apply(a, b, a_log, dt_bias)


class _DeltaGating(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(a, b, a_log, dt_bias)
        return forward(a, b, a_log, dt_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dg: Tensor, d_beta: Tensor) -> tuple[Tensor | None, ...]:
        return backward(dg, d_beta, *ctx.saved_tensors, *ctx.needs_input_grad)


def forward(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    a_rows, b_rows = rows_of(a), rows_of(b)
    g = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    beta = torch.empty(b.shape, dtype=b.dtype, device=b.device)
    grid, tiling = row_tiling(a_rows, FORWARD)
    rows = a_rows.shape[0]
    strides = a_rows.stride(0), b_rows.stride(0)
    launch.launch(
        _forward, a.device, grid, a_rows, b_rows, a_log, dt_bias, g, beta, rows, *strides, D=a_rows.shape[1], **tiling
    )
    return g, beta


def backward(
    dg: Tensor,
    d_beta: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    needs_a: bool,
    needs_b: bool,
    needs_a_log: bool,
    needs_dt_bias: bool,
) -> tuple[Tensor | None, ...]:
    a_rows, b_rows, dg_rows, d_beta_rows = rows_of(a), rows_of(b), rows_of(dg), rows_of(d_beta)
    rows, heads = a_rows.shape
    da = torch.empty(a.shape, dtype=a.dtype, device=a.device) if needs_a else None
    db = torch.empty(b.shape, dtype=b.dtype, device=b.device) if needs_b else None
    needs_sums = needs_a_log or needs_dt_bias
    grid, tiling = row_tiling(a_rows, BACKWARD, needs_sums)
    partial = torch.empty(grid, 2 * heads, dtype=torch.float32, device=a.device) if needs_sums else None
    launch.launch(
        _backward,
        a.device,
        grid,
        dg_rows,
        d_beta_rows,
        a_rows,
        b_rows,
        a_log,
        dt_bias,
        da,
        db,
        partial,
        rows,
        dg_rows.stride(0),
        d_beta_rows.stride(0),
        a_rows.stride(0),
        b_rows.stride(0),
        NEEDS_A=needs_a,
        NEEDS_B=needs_b,
        NEEDS_SUMS=needs_sums,
        D=a_rows.shape[1],
        **tiling,
    )
    d_a_log = d_dt_bias = None
    if needs_sums:
        d_a_log, d_dt_bias = sum_rows(partial, torch.float32).split(heads)
    return (
        da,
        db,
        d_a_log.to(a_log.dtype) if needs_a_log else None,
        d_dt_bias.to(dt_bias.dtype) if needs_dt_bias else None,
    )


@triton.jit
def _softplus(x):
    """log(1 + exp(x)), which is x + log(1 + exp(-x)); log1p so that very negative x keep their digits."""
    t = tl.exp(-tl.abs(x))
    u = 1.0 + t
    return tl.maximum(x, 0.0) + tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def _forward(
    a,
    b,
    a_log,
    dt_bias,
    g,
    beta,
    rows,
    a_row,
    b_row,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.arange(0, BLOCK)[:, None]
    head = tl.arange(0, BLOCK_D)
    rate = -tl.exp(tl.load(a_log + head, mask=head < D, other=0.0).to(tl.float32))[None, :]
    bias = tl.load(dt_bias + head, mask=head < D, other=0.0).to(tl.float32)[None, :]
    head = head[None, :]
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block * BLOCK, tl.int64)
        inside = (row < rows - block * BLOCK) & (head < D)
        x = tl.load(a + first * a_row + row * a_row + head, mask=inside, other=0.0).to(tl.float32) + bias
        tl.store(g + first * D + row * D + head, rate * _softplus(x), mask=inside)
        y = tl.load(b + first * b_row + row * b_row + head, mask=inside, other=0.0).to(tl.float32)
        tl.store(beta + first * D + row * D + head, tl.sigmoid(y), mask=inside)


@triton.jit
def _backward(
    dg,
    d_beta,
    a,
    b,
    a_log,
    dt_bias,
    da,
    db,
    partial,
    rows,
    dg_row,
    d_beta_row,
    a_row,
    b_row,
    NEEDS_A: tl.constexpr,
    NEEDS_B: tl.constexpr,
    NEEDS_SUMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With x = a + dt_bias and r = -exp(A_log): da = dg r sigmoid(x), d A_log = sum dg g, d dt_bias = sum da."""
    row = tl.arange(0, BLOCK)[:, None]
    place = tl.arange(0, BLOCK_D)
    rate = -tl.exp(tl.load(a_log + place, mask=place < D, other=0.0).to(tl.float32))[None, :]
    bias = tl.load(dt_bias + place, mask=place < D, other=0.0).to(tl.float32)[None, :]
    head = place[None, :]
    a_log_sums = tl.zeros([BLOCK_D], tl.float32)
    bias_sums = tl.zeros([BLOCK_D], tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(block * BLOCK, tl.int64)
        inside = (row < rows - block * BLOCK) & (head < D)
        if NEEDS_A or NEEDS_SUMS:
            x = tl.load(a + first * a_row + row * a_row + head, mask=inside, other=0.0).to(tl.float32) + bias
            d = tl.load(dg + first * dg_row + row * dg_row + head, mask=inside, other=0.0).to(tl.float32) * rate
            slope = d * tl.sigmoid(x)
            if NEEDS_A:
                tl.store(da + first * D + row * D + head, slope, mask=inside)
            if NEEDS_SUMS:
                a_log_sums += tl.sum(d * _softplus(x), 0)
                bias_sums += tl.sum(slope, 0)
        if NEEDS_B:
            y = tl.load(b + first * b_row + row * b_row + head, mask=inside, other=0.0).to(tl.float32)
            e = tl.load(d_beta + first * d_beta_row + row * d_beta_row + head, mask=inside, other=0.0).to(tl.float32)
            y = tl.sigmoid(y)
            tl.store(db + first * D + row * D + head, e * y * (1.0 - y), mask=inside)
    if NEEDS_SUMS:
        sums = partial + tl.program_id(0).to(tl.int64) * (2 * D)
        tl.store(sums + place, a_log_sums, mask=place < D)
        tl.store(sums + D + place, bias_sums, mask=place < D)
