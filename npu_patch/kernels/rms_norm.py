"""RMSNorm of rows in one launch forward and one backward: of x, or of x + residual, which then is a result too; times
an activation of a gate, where there is one.

A decoder layer adds to the residual stream and normalizes the sum. Together they read two rows and write two; the
backward reads two rows and the stream's gradient and writes one, which is the gradient of both addends. All is
float32 inside: the norm is of the sum before it is rounded, and what a gate multiplies is rounded once. Kept for the
backward: the rounded sum, or x, whose rstd it computes anew, and the gate.
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
UNGATED = 0  # beside the numbers of `gamma.ACTIVATIONS`


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, gamma: Gamma = WEIGHT
) -> tuple[Tensor, Tensor]:
    """RMSNorm(x + residual) and x + residual, for x and residual `[..., D]` of one dtype and weight `[D]`.

    `gamma` has a kernel, `eps` is positive.
    """
    return RMSNorm.apply(x, residual, None, weight, eps, gamma, UNGATED, (FORWARD, BACKWARD))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gamma: Gamma = WEIGHT) -> Tensor:
    """RMSNorm of x `[..., D]` alone, in its dtype."""
    return RMSNorm.apply(x, None, None, weight, eps, gamma, UNGATED, (FORWARD, BACKWARD))[0]


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        residual: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        eps: float,
        gamma: Gamma,
        activation: int,
        tiles: tuple[launch.Tile, launch.Tile],
    ) -> tuple[Tensor, Tensor | None]:
        y, total = forward(x, residual, gate, weight, eps, gamma, activation, tiles[0])
        ctx.save_for_backward(x if total is None else total, gate, weight)
        ctx.set_materialize_grads(False)
        ctx.norm = eps, gamma, activation, tiles[1]
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        needs_x, needs_residual, *needs = ctx.needs_input_grad[:4]
        dx, d_gate, d_weight = d_total, None, None
        if dy is not None:
            needed = needs_x or needs_residual, *needs
            dx, d_gate, d_weight = backward(dy, d_total, *ctx.saved_tensors, *ctx.norm, *needed)
        return (dx if needs_x else None), (dx if needs_residual else None), d_gate, d_weight, None, None, None, None


def forward(
    x: Tensor,
    residual: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    gamma: Gamma,
    activation: int,
    tile: launch.Tile,
) -> tuple[Tensor, Tensor | None]:
    rows, (residual_rows, residual_row), (gate_rows, gate_row) = rows_of(x), _rows(residual), _rows(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, tiling = row_tiling(rows, tile)
    launch.launch(
        _forward, x.device, grid,
        rows, residual_rows, gate_rows, weight, y, total,
        rows.shape[0], rows.stride(0), residual_row, gate_row, eps,
        GAMMA=gamma.kernel, ADDS=residual is not None, GATE=activation, D=rows.shape[1], **tiling,
    )  # fmt: skip
    return y, total


def backward(
    dy: Tensor,
    d_total: Tensor | None,
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    gamma: Gamma,
    activation: int,
    tile: launch.Tile,
    needs_x: bool,
    needs_gate: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, to which that of the stream is added, of the gate and of the weight."""
    rows, dy_rows, (total_rows, total_row), (gate_rows, gate_row) = rows_of(x), rows_of(dy), _rows(d_total), _rows(gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_gate = None if gate is None or not needs_gate else torch.empty(gate.shape, dtype=gate.dtype, device=x.device)
    grid, tiling = row_tiling(rows, tile, needs_weight)
    partial = torch.empty(grid, rows.shape[1], dtype=torch.float32, device=x.device) if needs_weight else None
    launch.launch(
        _backward, x.device, grid,
        dy_rows, total_rows, rows, gate_rows, weight, dx, d_gate, partial,
        rows.shape[0], dy_rows.stride(0), total_row, rows.stride(0), gate_row, eps,
        GAMMA=gamma.kernel, ADDS=d_total is not None, GATE=activation,
        NEEDS_X=needs_x, NEEDS_GATE=needs_gate, NEEDS_WEIGHT=needs_weight, D=rows.shape[1], **tiling,
    )  # fmt: skip
    return dx, d_gate, weight_gradient(partial, weight, gamma)


def _rows(x: Tensor | None) -> tuple[Tensor | None, int]:
    """With how far they lie apart."""
    if x is None:
        return None, 0
    rows = rows_of(x)
    return rows, rows.stride(0)


@triton.jit
def _forward(
    x, residual, gate, weight, y, total,
    rows, x_row, residual_row, gate_row, eps,
    GAMMA: tl.constexpr, ADDS: tl.constexpr, GATE: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
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
        if GATE > 0:
            z = tl.load(gate + first * gate_row + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
            activated = tl.sigmoid(z)
            if GATE == 2:
                activated = activated * z
            a = a * activated
        tl.store(y + first * D + row * D + column, a, mask=inside)


@triton.jit
def _backward(
    dy, d_total, x, gate, weight, dx, d_gate, partial,
    rows, dy_row, d_total_row, x_row, gate_row, eps,
    GAMMA: tl.constexpr, ADDS: tl.constexpr, GATE: tl.constexpr,
    NEEDS_X: tl.constexpr, NEEDS_GATE: tl.constexpr, NEEDS_WEIGHT: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With n = x * rstd, a = act(gate), or 1: d gate = dy n gamma a'; with d = dy a, d gamma = sum d n and
    dx = d total + rstd (d gamma - n mean(d gamma n))."""
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
        if GATE > 0:
            z = tl.load(gate + first * gate_row + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
            activated = tl.sigmoid(z)
            slope = activated * (1.0 - activated)
            if GATE == 2:
                slope = activated + z * slope
                activated = activated * z
            if NEEDS_GATE:
                dz = d * n * slope
                if GAMMA > 0:
                    dz = dz * gamma
                tl.store(d_gate + first * D + row * D + column, dz, mask=inside)
            d = d * activated
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
