"""What the gradients through a group's adapters give: dx += sum_i keep_i(through_i A_i), and the sums of
dA_i = through_i' keep_i(x), in one launch that reads x and dx once. The masks are those of `shrink`, made again."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.dot import add_dot, parts_of
from npu_patch.kernels.lora.mask import draws, keeps
from npu_patch.kernels.lora.tiling import of_most, splits, tiling

TILE = launch.Tile(bytes_per_element=64, elements=2048, stages=3)


@functools.lru_cache(launch.KEPT)
def rows_are_split_in(machine: launch.Machine, width: int, rows: int, rank: int) -> int:
    """How many partial sums this leaves."""
    constants = tiling(machine, rows, width, rank, TILE)
    return splits(machine, launch.blocks_of(width, constants["BLOCK_K"]), launch.blocks_of(rows, constants["BLOCK"]))


def add_input_side(
    dx: Tensor | None,
    partial: Tensor | None,
    x: Tensor | None,
    through: Tensor,
    downs: Sequence[Tensor] | Sequence[None],
    width: int,
    seed: int | Tensor | None,
    dropout: float,
    product: torch.dtype,
) -> None:
    """dx `[T, in]`, contiguous, is changed in place; float32 `partial` `[splits, n r in]`, rows of which may lie apart,
    is written. Either may be None, the A_i with the former and x with the latter. `through`, float32 `[n, T, r]`, is of
    what the mask keeps already divided by its probability."""
    device = through.device
    parts, row = (None, 0) if partial is None else (partial.shape[0], partial.stride(0))
    planned = _planned(
        launch.machine_of(device),
        device,
        through.shape,
        width,
        None if x is None else x.stride(0),
        parts,
        row,
        dropout,
        isinstance(seed, Tensor),
        (product, None if dx is None else dx.dtype, None if downs[0] is None else downs[0].dtype),
    )
    planned((dx, partial, x, through, *of_most(downs)), seed)


@functools.lru_cache(launch.KEPT)
def _planned(
    machine: launch.Machine, device: torch.device, shape: torch.Size, width: int, x_row: int | None,
    parts: int | None, row: int, dropout: float, loaded: bool, dtypes: tuple[torch.dtype | None, ...],
) -> launch.Planned:  # fmt: skip
    """`dtypes`: of the products, of dx and of the A_i, None without."""
    count, rows, rank = shape
    constants = tiling(machine, rows, width, rank, TILE, count)
    splits_of_rows = parts or rows_are_split_in(machine, width, rows, rank)
    return launch.Planned(
        _input_side,
        device,
        launch.programs(machine, splits_of_rows * launch.blocks_of(width, constants["BLOCK_K"]), TILE),
        (rows, width, rank, x_row or 0, dropout, splits_of_rows, row),
        N=count,
        DROPS=dropout > 0,
        LOADED=loaded,
        NEEDS_X=dtypes[1] is not None,
        NEEDS_DOWN=parts is not None,
        PARTS=parts_of(machine, dtypes[0]),
        **constants,
    )


@triton.jit
def _input_side(
    dx, partial, x, through,
    down0, down1, down2,
    seed, rows, width, rank, x_row, drops, splits, partial_row,
    N: tl.constexpr, DROPS: tl.constexpr, LOADED: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block: some columns, over the rows of one split."""
    across = tl.cdiv(width, BLOCK_K)
    length = tl.cdiv(tl.cdiv(rows, BLOCK), splits) * BLOCK
    size = tl.cast(rows, tl.int64) * rank
    for block in range(tl.program_id(0), splits * across, tl.num_programs(0)):
        split = block // across
        column = block % across * BLOCK_K + tl.arange(0, BLOCK_K)
        sum0 = tl.zeros([R, BLOCK_K], tl.float32)
        sum1 = tl.zeros([R, BLOCK_K], tl.float32)
        sum2 = tl.zeros([R, BLOCK_K], tl.float32)
        for start in tl.range(split * length, tl.minimum(rows, (split + 1) * length), BLOCK, num_stages=STAGES):
            row = start + tl.arange(0, BLOCK)
            far = tl.cast(row, tl.int64)[:, None]
            inside = (row < rows)[:, None] & (column < width)[None, :]
            tile = through  # where it is not needed, none
            total = through
            if NEEDS_DOWN:
                tile = tl.load(x + far * x_row + column[None, :], mask=inside, other=0.0)
            if NEEDS_X:
                total = tl.load(dx + far * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
            drawn = draws(seed, row, column, LOADED) if DROPS else 0
            sum0, total = _add(
                sum0, total, tile, through, down0, drawn, row, column, rows, width, rank, drops,
                0, DROPS, NEEDS_X, NEEDS_DOWN, PARTS, BLOCK, BLOCK_K, R,
            )  # fmt: skip
            if N > 1:
                sum1, total = _add(
                    sum1, total, tile, through + size, down1, drawn, row, column, rows, width, rank, drops,
                    1, DROPS, NEEDS_X, NEEDS_DOWN, PARTS, BLOCK, BLOCK_K, R,
                )  # fmt: skip
            if N > 2:
                sum2, total = _add(
                    sum2, total, tile, through + 2 * size, down2, drawn, row, column, rows, width, rank, drops,
                    2, DROPS, NEEDS_X, NEEDS_DOWN, PARTS, BLOCK, BLOCK_K, R,
                )  # fmt: skip
            if NEEDS_X:
                tl.store(dx + far * width + column[None, :], total, mask=inside)
        if NEEDS_DOWN:
            here = partial + tl.cast(split, tl.int64) * partial_row
            _store(here, sum0, column, width, rank, R)
            if N > 1:
                _store(here + rank * width, sum1, column, width, rank, R)
            if N > 2:
                _store(here + 2 * rank * width, sum2, column, width, rank, R)


@triton.jit
def _add(
    sums, total, tile, through, down, drawn, row, column, rows, width, rank, drops,
    INDEX: tl.constexpr, DROPS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, R)
    inside = (row < rows)[:, None] & (place < rank)[None, :]
    through = tl.load(through + tl.cast(row, tl.int64)[:, None] * rank + place[None, :], mask=inside, other=0.0)
    if DROPS:
        kept = keeps(drawn, drops, INDEX)
    if NEEDS_DOWN:
        if DROPS:
            tile = tl.where(kept, tile, 0.0)
        sums = add_dot(sums, tl.trans(through), tile, PARTS)
    if NEEDS_X:
        inside = (place < rank)[:, None] & (column < width)[None, :]
        a = tl.load(down + place[:, None] * width + column[None, :], mask=inside, other=0.0)
        added = add_dot(tl.zeros([BLOCK, BLOCK_K], tl.float32), through, a, PARTS)
        if DROPS:
            added = tl.where(kept, added, 0.0)
        total += added
    return sums, total


@triton.jit
def _store(partial, sums, column, width, rank, R: tl.constexpr):
    place = tl.arange(0, R)
    inside = (place < rank)[:, None] & (column < width)[None, :]
    tl.store(partial + place[:, None] * width + column[None, :], sums, mask=inside)
