"""What the gradient of a group's outputs gives: through_i = s dy_i B_i, and the sums of dB_i = s dy_i' h_i.

The first sums over columns and the second over rows, so each is a launch of its own, for the whole group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.dot import add_dot, parts_of
from npu_patch.kernels.lora.expand import next_first
from npu_patch.kernels.lora.tiling import of_most, tiling

THROUGH = launch.Tile(bytes_per_element=24, elements=8192)
UP = launch.Tile(bytes_per_element=24, elements=8192)


def through_adapters(dys: Sequence[Tensor], ups: Sequence[Tensor], scaling: float) -> Tensor:
    """dy_i `[T, out_i]` with adjacent columns, B_i `[out_i, r]` -> float32 `[n, T, r]`."""
    device, rows, rank = dys[0].device, dys[0].shape[0], ups[0].shape[1]
    through = torch.empty(len(dys), rows, rank, dtype=torch.float32, device=device)
    dtypes = dys[0].dtype, ups[0].dtype
    planned = _through_planned(launch.machine_of(device), device, rows, *_of_each(dys), rank, scaling, dtypes)
    planned((*of_most(dys), *of_most(ups), through))
    return through


@functools.lru_cache(launch.KEPT)
def _through_planned(
    machine: launch.Machine, device: torch.device, rows: int, widths: tuple[int, ...], strides: tuple[int, ...],
    rank: int, scaling: float, dtypes: tuple[torch.dtype, ...],
) -> launch.Planned:  # fmt: skip
    constants = tiling(machine, rows, max(widths), rank, THROUGH)
    return launch.Planned(
        _through,
        device,
        launch.programs(machine, len(widths) * launch.blocks_of(rows, constants["BLOCK"]), THROUGH),
        (*of_most(widths, 0), *of_most(strides, 0), rows, rank, scaling),
        N=len(widths),
        PARTS=parts_of(machine, dtypes[0]),
        **constants,
    )


def sum_ups(partial: Tensor, dys: list[Tensor], h: Tensor, scaling: float) -> None:
    """Into the first columns of float32 `[splits, ...]`, for each split of the rows: dB_0 `[out_0, r]`, dB_1 ..."""
    device, (_, rows, rank), (splits, row), dtype = h.device, h.shape, partial.shape, dys[0].dtype
    machine = launch.machine_of(device)
    planned = _sum_planned(machine, device, rows, *_of_each(dys), rank, scaling, splits, row, dtype)
    planned((*of_most(dys), h, partial))


@functools.lru_cache(launch.KEPT)
def _sum_planned(
    machine: launch.Machine, device: torch.device, rows: int, widths: tuple[int, ...], strides: tuple[int, ...],
    rank: int, scaling: float, splits: int, row: int, dtype: torch.dtype,
) -> launch.Planned:  # fmt: skip
    constants = tiling(machine, rows, max(widths), rank, UP)
    blocks = splits * sum(launch.blocks_of(width, constants["BLOCK_K"]) for width in widths)
    return launch.Planned(
        _sum_ups,
        device,
        launch.programs(machine, blocks, UP),
        (*of_most(widths, 0), *of_most(strides, 0), rows, rank, scaling, splits, row),
        N=len(widths),
        PARTS=parts_of(machine, dtype),
        **constants,
    )


def _of_each(dys: Sequence[Tensor]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths, and the strides of the rows."""
    return tuple([dy.shape[1] for dy in dys]), tuple([dy.stride(0) for dy in dys])


@triton.jit
def _through(
    dy0, dy1, dy2,
    up0, up1, up2,
    through,
    width0, width1, width2,
    dy0_row, dy1_row, dy2_row,
    rows, rank, scaling,
    N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(rows, BLOCK)
    size = tl.cast(rows, tl.int64) * rank
    first = tl.program_id(0)
    _through_one(dy0, up0, through, width0, dy0_row, rows, rank, scaling, first, PARTS, BLOCK, BLOCK_K, R, STAGES)
    if N > 1:
        first = next_first(first, blocks)
        through += size
        _through_one(dy1, up1, through, width1, dy1_row, rows, rank, scaling, first, PARTS, BLOCK, BLOCK_K, R, STAGES)
    if N > 2:
        first = next_first(first, blocks)
        through += size
        _through_one(dy2, up2, through, width2, dy2_row, rows, rank, scaling, first, PARTS, BLOCK, BLOCK_K, R, STAGES)


@triton.jit
def _through_one(
    dy, up, through, width, dy_row, rows, rank, scaling, first,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, R)
    for block in range(first, tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        far = tl.cast(row, tl.int64)[:, None]
        total = tl.zeros([BLOCK, R], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_K)
            inside = (row < rows)[:, None] & (column < width)[None, :]
            tile = tl.load(dy + far * dy_row + column[None, :], mask=inside, other=0.0)
            inside = (column < width)[:, None] & (place < rank)[None, :]
            b = tl.load(up + column[:, None] * rank + place[None, :], mask=inside, other=0.0)
            total = add_dot(total, tile, b, PARTS)
        inside = (row < rows)[:, None] & (place < rank)[None, :]
        tl.store(through + far * rank + place[None, :], total * scaling, mask=inside)


@triton.jit
def _sum_ups(
    dy0, dy1, dy2,
    h, partial,
    width0, width1, width2,
    dy0_row, dy1_row, dy2_row,
    rows, rank, scaling, splits, partial_row,
    N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    size = tl.cast(rows, tl.int64) * rank
    first = _sum_one(
        dy0, h, partial, width0, dy0_row, rows, rank, scaling, splits, partial_row, tl.program_id(0),
        PARTS, BLOCK, BLOCK_K, R, STAGES,
    )  # fmt: skip
    if N > 1:
        h += size
        partial += width0 * rank
        first = _sum_one(
            dy1, h, partial, width1, dy1_row, rows, rank, scaling, splits, partial_row, first,
            PARTS, BLOCK, BLOCK_K, R, STAGES,
        )  # fmt: skip
    if N > 2:
        h += size
        partial += width1 * rank
        first = _sum_one(
            dy2, h, partial, width2, dy2_row, rows, rank, scaling, splits, partial_row, first,
            PARTS, BLOCK, BLOCK_K, R, STAGES,
        )  # fmt: skip


@triton.jit
def _sum_one(
    dy, h, partial, width, dy_row, rows, rank, scaling, splits, partial_row, first,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A block: some columns of dy, over the rows of one split."""
    across = tl.cdiv(width, BLOCK_K)
    blocks = splits * across
    length = tl.cdiv(tl.cdiv(rows, BLOCK), splits) * BLOCK
    place = tl.arange(0, R)
    for block in range(first, blocks, tl.num_programs(0)):
        split = block // across
        column = block % across * BLOCK_K + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_K, R], tl.float32)
        for start in tl.range(split * length, tl.minimum(rows, (split + 1) * length), BLOCK, num_stages=STAGES):
            row = start + tl.arange(0, BLOCK)
            far = tl.cast(row, tl.int64)[:, None]
            inside = (row < rows)[:, None] & (column < width)[None, :]
            tile = tl.load(dy + far * dy_row + column[None, :], mask=inside, other=0.0)
            inside = (row < rows)[:, None] & (place < rank)[None, :]
            shrunk = tl.load(h + far * rank + place[None, :], mask=inside, other=0.0)
            total = add_dot(total, tl.trans(tile), shrunk, PARTS)
        inside = (column < width)[:, None] & (place < rank)[None, :]
        here = partial + tl.cast(split, tl.int64) * partial_row + column[:, None] * rank + place[None, :]
        tl.store(here, total * scaling, mask=inside)
    return next_first(first, blocks)
