"""The second step of a gradient that sums over all rows: each program leaves a row, and this adds the rows."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.gamma import Gamma

# Rows and columns of a tile. A CUDA device has hundreds of rows to add: few columns make many programs, and many rows
# at once few waits for memory.
BLOCKS = {"cuda": (64, 16)}
OTHER_BLOCKS = (32, 64)
TILE = launch.Tile(bytes_per_element=16, elements=2048)


def weight_gradient(partial: Tensor | None, weight: Tensor | None, gamma: Gamma) -> Tensor | None:
    """Of a weight `[N]`, from the rows that programs left of gamma's gradient; None where they left none."""
    if partial is None or weight is None:
        return None
    return gamma.weight_gradient(sum_rows(partial, gamma.summed_in(weight)), weight)


def sum_rows(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of float32 `[P, N]` over P, rounded once to `dtype`: `[N]`. One launch."""
    device, (rows, columns) = partial.device, partial.shape
    total = torch.empty(columns, dtype=dtype, device=device)
    _planned(launch.machine_of(device), device, rows, columns, dtype)((partial, total))
    return total


@functools.lru_cache(launch.KEPT)
def _planned(
    machine: launch.Machine, device: torch.device, rows: int, columns: int, dtype: torch.dtype
) -> launch.Planned:
    block_rows, block_columns = BLOCKS.get(machine.device_type, OTHER_BLOCKS)
    grid = launch.programs(machine, launch.blocks_of(columns, block_columns), TILE)
    blocks = {"BLOCK_ROWS": block_rows, "BLOCK_COLUMNS": block_columns}
    return launch.Planned(_sum_rows, device, grid, (rows, columns), num_warps=4, **blocks)


@triton.jit
def _sum_rows(partial, total, rows, columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    for block in range(tl.program_id(0), tl.cdiv(columns, BLOCK_COLUMNS), tl.num_programs(0)):
        column = block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        row = tl.arange(0, BLOCK_ROWS)
        sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        for start in range(0, rows, BLOCK_ROWS):
            inside = ((start + row) < rows)[:, None] & (column < columns)[None, :]
            sums += tl.load(partial + (start + row)[:, None] * columns + column[None, :], mask=inside, other=0.0)
        tl.store(total + column, tl.sum(sums, 0), mask=column < columns)
