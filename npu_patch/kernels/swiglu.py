"""SwiGLU of two tensors, `silu(gate) * up`, without concatenating them (https://arxiv.org/abs/2002.05202).

For I elements in gate the forward moves 3 I in one launch and the backward 5 I in one launch, in float32 inside and
rounded once. Kept for the backward: gate and up.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.kernels import launch
from npu_patch.numerics.autograd import Context

FORWARD = launch.Tile(bytes_per_element=24, elements=2048)
BACKWARD = launch.Tile(bytes_per_element=40, elements=2048)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors `[..., I]` of one shape and dtype; rows may lie apart, as halves of one do."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return backward(dy, *ctx.saved_tensors, *ctx.needs_input_grad)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    tensors, rows, columns = _rows([gate, up, y])
    block, grid, num_warps = _tiling(launch.machine_of(gate.device), rows, columns, FORWARD)
    strides = [tensor.stride(0) for tensor in tensors]
    launch.launch(_forward, gate.device, grid, *tensors, rows, columns, *strides, num_warps=num_warps, BLOCK=block)
    return y


def backward(
    dy: Tensor, gate: Tensor, up: Tensor, needs_gate: bool = True, needs_up: bool = True
) -> tuple[Tensor | None, Tensor | None]:
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if needs_gate else None
    d_up = torch.empty(up.shape, dtype=up.dtype, device=up.device) if needs_up else None
    made = [tensor for tensor in (d_gate, d_up) if tensor is not None]
    (dy_rows, gate_rows, up_rows, *made_rows), rows, columns = _rows([dy, gate, up, *made])
    block, grid, num_warps = _tiling(launch.machine_of(gate.device), rows, columns, BACKWARD)
    launch.launch(
        _backward,
        gate.device,
        grid,
        dy_rows,
        gate_rows,
        up_rows,
        made_rows[0] if needs_gate else None,
        made_rows[-1] if needs_up else None,
        rows,
        columns,
        dy_rows.stride(0),
        gate_rows.stride(0),
        up_rows.stride(0),
        made_rows[0].stride(0),
        num_warps=num_warps,
        NEEDS_GATE=needs_gate,
        NEEDS_UP=needs_up,
        BLOCK=block,
    )
    return d_gate, d_up


def _rows(tensors: list[Tensor]) -> tuple[list[Tensor], int, int]:
    """All as `[rows, columns]` with adjacent columns: one long row where everything is contiguous."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors], 1, tensors[0].numel()
    columns = tensors[0].shape[-1]
    flat = [(tensor if tensor.stride(-1) == 1 else tensor.contiguous()).reshape(-1, columns) for tensor in tensors]
    return flat, flat[0].shape[0], columns


@functools.lru_cache(launch.KEPT)
def _tiling(machine: launch.Machine, rows: int, columns: int, tile: launch.Tile) -> tuple[int, int, int]:
    block = min(launch.tile_rows(machine, tile, 1, rows * columns), launch.power_of_two(columns))
    return block, launch.programs(machine, rows * launch.blocks_of(columns, block), tile), launch.warps(tile, block)


@triton.jit
def _forward(gate, up, y, rows, columns, gate_row, up_row, y_row, BLOCK: tl.constexpr):
    per_row = tl.cdiv(columns, BLOCK)
    for block in range(tl.program_id(0), rows * per_row, tl.num_programs(0)):
        row = tl.cast(block // per_row, tl.int64)
        start = tl.cast(block % per_row, tl.int64) * BLOCK
        column = tl.arange(0, BLOCK)
        inside = column < columns - start
        a = tl.load(gate + row * gate_row + start + column, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(up + row * up_row + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + row * y_row + start + column, a * tl.sigmoid(a) * b, mask=inside)


@triton.jit
def _backward(
    dy,
    gate,
    up,
    d_gate,
    d_up,
    rows,
    columns,
    dy_row,
    gate_row,
    up_row,
    d_row,
    NEEDS_GATE: tl.constexpr,
    NEEDS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    per_row = tl.cdiv(columns, BLOCK)
    for block in range(tl.program_id(0), rows * per_row, tl.num_programs(0)):
        row = tl.cast(block // per_row, tl.int64)
        start = tl.cast(block % per_row, tl.int64) * BLOCK
        column = tl.arange(0, BLOCK)
        inside = column < columns - start
        d = tl.load(dy + row * dy_row + start + column, mask=inside, other=0.0).to(tl.float32)
        a = tl.load(gate + row * gate_row + start + column, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(a)
        if NEEDS_GATE:
            b = tl.load(up + row * up_row + start + column, mask=inside, other=0.0).to(tl.float32)
            slope = sigmoid * (1.0 + a * (1.0 - sigmoid))
            tl.store(d_gate + row * d_row + start + column, d * b * slope, mask=inside)
        if NEEDS_UP:
            tl.store(d_up + row * d_row + start + column, d * a * sigmoid, mask=inside)
