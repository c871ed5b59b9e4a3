"""The second step of a gradient that sums over all rows: each program leaves a row, and this adds the rows."""

from __future__ import annotations

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
    rows, columns = partial.shape
    machine = launch.machine_of(partial.device)
    block_rows, block_columns = BLOCKS.get(machine.device_type, OTHER_BLOCKS)
    total = torch.empty(columns, dtype=dtype, device=partial.device)
    grid = launch.programs(machine, launch.blocks_of(columns, block_columns), TILE)
    launch.launch(
        _sum_rows,
        partial.device,
        grid,
        partial,
        total,
        rows,
        columns,
        num_warps=4,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
    )
    return total


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
