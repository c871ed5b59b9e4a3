"""RMSNorm whose result is multiplied by an activation of a gate, in one launch forward and one backward.

For a head of D elements the forward moves 3 D and the backward 5 D; x, the gate and the weight are all that is kept.
All is float32 inside and rounded once. Source of the formula: Mamba 2 (https://arxiv.org/abs/2405.21060), as the gated
delta nets of qwen3_next and qwen3_5 use it.
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
from npu_patch.kernels.variants import ACTIVATIONS
from npu_patch.numerics.autograd import Context

FORWARD = launch.Tile(bytes_per_element=32, elements=4096, least_bytes=19)
BACKWARD = launch.Tile(bytes_per_element=48, elements=4096, least_bytes=35)
TILES = (FORWARD, BACKWARD)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str = "silu", gamma: Gamma = WEIGHT
) -> Tensor:
    """RMSNorm(x) * activation(gate) for x and gate `[..., D]` and weight `[D]`, in the dtype of x.

    `activation` is a name of `ACTIVATIONS`, `gamma` has a kernel, `eps` is positive.
    """
    return _GatedRMSNorm.apply(x, gate, weight, eps, activation, gamma)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str, gamma: Gamma
    ) -> Tensor:
        ctx.save_for_backward(x, gate, weight)
        ctx.norm = eps, activation, gamma
        return forward(x, gate, weight, eps, activation, gamma)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        return *backward(dy, *ctx.saved_tensors, *ctx.norm, *ctx.needs_input_grad[:3]), None, None, None


def forward(x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str, gamma: Gamma) -> Tensor:
    rows, gate_rows = rows_of(x), rows_of(gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid, tiling = row_tiling(rows, FORWARD)
    launch.launch(
        _forward, x.device, grid,
        rows, gate_rows, weight, y,
        rows.shape[0], rows.stride(0), gate_rows.stride(0), eps,
        GAMMA=gamma.kernel, SILU=ACTIVATIONS[activation], D=rows.shape[1], **tiling,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    gate: Tensor,
    weight: Tensor | None,
    eps: float,
    activation: str,
    gamma: Gamma,
    needs_x: bool,
    needs_gate: bool,
    needs_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rows, gate_rows, dy_rows = rows_of(x), rows_of(gate), rows_of(dy)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs_x else None
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=x.device) if needs_gate else None
    grid, tiling = row_tiling(rows, BACKWARD, needs_weight)
    partial = torch.empty(grid, rows.shape[1], dtype=torch.float32, device=x.device) if needs_weight else None
    launch.launch(
        _backward, x.device, grid,
        dy_rows, rows, gate_rows, weight, dx, d_gate, partial,
        rows.shape[0], dy_rows.stride(0), rows.stride(0), gate_rows.stride(0), eps,
        GAMMA=gamma.kernel, SILU=ACTIVATIONS[activation],
        NEEDS_X=needs_x, NEEDS_GATE=needs_gate, NEEDS_WEIGHT=needs_weight, D=rows.shape[1], **tiling,
    )  # fmt: skip
    return dx, d_gate, weight_gradient(partial, weight, gamma)


@triton.jit
def _forward(
    x, gate, weight, y,
    rows, x_row, gate_row, eps,
    GAMMA: tl.constexpr, SILU: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
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
        n = tl.load(x + first * x_row + row * x_row + column, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(gate + first * gate_row + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        n = n * tl.rsqrt(tl.sum(n * n, 1) * (1.0 / D) + eps)[:, None]
        if GAMMA > 0:
            n = n * gamma
        activated = tl.sigmoid(z)
        if SILU:
            activated = activated * z
        tl.store(y + first * D + row * D + column, n * activated, mask=inside)


@triton.jit
def _backward(
    dy, x, gate, weight, dx, d_gate, partial,
    rows, dy_row, x_row, gate_row, eps,
    GAMMA: tl.constexpr, SILU: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_GATE: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With n = x * rstd, a = act(gate): d gate = dy n gamma a', and the norm's backward for dy a."""
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
        z = tl.load(gate + first * gate_row + row * gate_row + column, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(dy + first * dy_row + row * dy_row + column, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(n * n, 1) * (1.0 / D) + eps)[:, None]
        n = n * rstd
        activated = tl.sigmoid(z)
        slope = activated * (1.0 - activated)
        if SILU:
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
            tl.store(dx + first * D + row * D + column, rstd * (d - n * mean), mask=inside)
    if NEEDS_WEIGHT:
        place = tl.arange(0, BLOCK_D)
        tl.store(partial + tl.program_id(0).to(tl.int64) * D + place, sums, mask=place < D)
