"""y_i += s h_i B_i' of every adapter of a group in one launch: added in float32, rounded once."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.dot import add_dot, parts_of
from npu_patch.kernels.lora.tiling import of_most, tiling

TILE = launch.Tile(bytes_per_element=32, elements=4096)


def expand_(ys: list[Tensor], h: Tensor, ups: list[Tensor], scaling: float) -> None:
    """y_i `[T, out_i]`, contiguous, changed in place; h float32 `[n, T, r]`, B_i `[out_i, r]`."""
    device, (_, rows, rank) = h.device, h.shape
    widths, dtypes = tuple([y.shape[1] for y in ys]), (ys[0].dtype, ups[0].dtype)
    planned = _planned(launch.machine_of(device), device, rows, widths, rank, scaling, dtypes)
    planned((*of_most(ys), *of_most(ups), h))


@functools.lru_cache(launch.KEPT)
def _planned(
    machine: launch.Machine, device: torch.device, rows: int, widths: tuple[int, ...], rank: int, scaling: float,
    dtypes: tuple[torch.dtype, ...],
) -> launch.Planned:  # fmt: skip
    constants = tiling(machine, rows, max(widths), rank, TILE)
    blocks = launch.blocks_of(rows, constants["BLOCK"]) * sum(
        launch.blocks_of(width, constants["BLOCK_K"]) for width in widths
    )
    return launch.Planned(
        _expand,
        device,
        launch.programs(machine, blocks, TILE),
        (*of_most(widths, 0), rows, rank, scaling),
        N=len(widths),
        PARTS=parts_of(machine, dtypes[0]),
        **constants,
    )


@triton.jit
def _expand(
    y0, y1, y2,
    up0, up1, up2,
    h,
    width0, width1, width2,
    rows, rank, scaling,
    N: tl.constexpr, PARTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    size = tl.cast(rows, tl.int64) * rank
    first = _expand_one(y0, up0, h, width0, rows, rank, scaling, tl.program_id(0), PARTS, BLOCK, BLOCK_K, R)
    if N > 1:
        first = _expand_one(y1, up1, h + size, width1, rows, rank, scaling, first, PARTS, BLOCK, BLOCK_K, R)
    if N > 2:
        first = _expand_one(y2, up2, h + 2 * size, width2, rows, rank, scaling, first, PARTS, BLOCK, BLOCK_K, R)


@triton.jit
def _expand_one(
    y, up, h, width, rows, rank, scaling, first,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """From block `first` on, and returns the program's first of the next adapter, whose blocks are numbered on."""
    across = tl.cdiv(width, BLOCK_K)
    blocks = tl.cdiv(rows, BLOCK) * across
    place = tl.arange(0, R)
    for block in range(first, blocks, tl.num_programs(0)):
        row = block // across * BLOCK + tl.arange(0, BLOCK)
        column = block % across * BLOCK_K + tl.arange(0, BLOCK_K)
        far = tl.cast(row, tl.int64)[:, None]
        inside = (row < rows)[:, None] & (place < rank)[None, :]
        tile = tl.load(h + far * rank + place[None, :], mask=inside, other=0.0)
        inside = (column < width)[:, None] & (place < rank)[None, :]
        b = tl.load(up + column[:, None] * rank + place[None, :], mask=inside, other=0.0)
        added = add_dot(tl.zeros([BLOCK, BLOCK_K], tl.float32), tile, tl.trans(b), PARTS) * scaling
        here = y + far * width + column[None, :]
        inside = (row < rows)[:, None] & (column < width)[None, :]
        total = tl.load(here, mask=inside, other=0.0).to(tl.float32) + added
        tl.store(here, total, mask=inside)
    return next_first(first, blocks)


@triton.jit
def next_first(first, blocks):
    """Of a program whose block would be `first`, the first after `blocks` that are numbered before."""
    programs = tl.num_programs(0)
    return first + tl.cdiv(tl.maximum(blocks - first, 0), programs) * programs - blocks
