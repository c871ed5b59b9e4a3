"""h_i = drop_i(x) A_i' of every adapter of a group in one launch, which reads x once and writes what is small."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.dot import add_dot, parts_of
from npu_patch.kernels.lora.mask import draws, keeps
from npu_patch.kernels.lora.tiling import of_most, tiling

TILE = launch.Tile(bytes_per_element=44, elements=8192, stages=3)


def shrink(x: Tensor, downs: list[Tensor], seed: int | Tensor | None, dropout: float) -> Tensor:
    """x `[T, in]` with adjacent columns, A_i `[r, in]` -> float32 `[n, T, r]`. `seed`: int64, where dropped."""
    device, count, (rows, width) = x.device, len(downs), x.shape
    rank = downs[0].shape[0]
    h = torch.empty(count, rows, rank, dtype=torch.float32, device=device)
    dtypes, machine, loaded = (x.dtype, downs[0].dtype), launch.machine_of(device), isinstance(seed, Tensor)
    planned = _planned(machine, device, count, rows, width, rank, x.stride(0), dropout, loaded, dtypes)
    planned((x, *of_most(downs), h), seed)
    return h


@functools.lru_cache(launch.KEPT)
def _planned(
    machine: launch.Machine, device: torch.device, count: int, rows: int, width: int, rank: int, x_row: int,
    dropout: float, loaded: bool, dtypes: tuple[torch.dtype, ...],
) -> launch.Planned:  # fmt: skip
    constants = tiling(machine, rows, width, rank, TILE, count)
    return launch.Planned(
        _shrink,
        device,
        launch.programs(machine, launch.blocks_of(rows, constants["BLOCK"]), TILE),
        (rows, width, rank, x_row, dropout, 1.0 / (1.0 - dropout)),
        N=count,
        DROPS=dropout > 0,
        LOADED=loaded,
        PARTS=parts_of(machine, dtypes[0]),
        **constants,
    )


@triton.jit
def _shrink(
    x,
    down0,
    down1,
    down2,
    h,
    seed,
    rows,
    width,
    rank,
    x_row,
    drops,
    scale,
    N: tl.constexpr,
    DROPS: tl.constexpr,
    LOADED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    R: tl.constexpr,
    STAGES: tl.constexpr,
):
    for block in range(tl.program_id(0), tl.cdiv(rows, BLOCK), tl.num_programs(0)):
        row = block * BLOCK + tl.arange(0, BLOCK)
        here = x + tl.cast(row, tl.int64)[:, None] * x_row
        h0 = tl.zeros([BLOCK, R], tl.float32)
        h1 = tl.zeros([BLOCK, R], tl.float32)
        h2 = tl.zeros([BLOCK, R], tl.float32)
        for start in tl.range(0, width, BLOCK_K, num_stages=STAGES):
            column = start + tl.arange(0, BLOCK_K)
            tile = tl.load(here + column[None, :], mask=(row < rows)[:, None] & (column < width)[None, :], other=0.0)
            drawn = draws(seed, row, column, LOADED) if DROPS else 0
            h0 = _add(h0, tile, down0, drawn, column, width, rank, drops, 0, DROPS, PARTS, R)
            if N > 1:
                h1 = _add(h1, tile, down1, drawn, column, width, rank, drops, 1, DROPS, PARTS, R)
            if N > 2:
                h2 = _add(h2, tile, down2, drawn, column, width, rank, drops, 2, DROPS, PARTS, R)
        size = tl.cast(rows, tl.int64) * rank
        _store(h, h0 * scale, row, rows, rank, R)
        if N > 1:
            _store(h + size, h1 * scale, row, rows, rank, R)
        if N > 2:
            _store(h + 2 * size, h2 * scale, row, rows, rank, R)


@triton.jit
def _add(
    total, tile, down, drawn, column, width, rank, drops,
    INDEX: tl.constexpr, DROPS: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    if DROPS:
        tile = tl.where(keeps(drawn, drops, INDEX), tile, 0.0)
    place = tl.arange(0, R)
    inside = (place < rank)[:, None] & (column < width)[None, :]
    a = tl.load(down + place[:, None] * width + column[None, :], mask=inside, other=0.0)
    return add_dot(total, tile, tl.trans(a), PARTS)


@triton.jit
def _store(h, tile, row, rows, rank, R: tl.constexpr):
    place = tl.arange(0, R)
    inside = (row < rows)[:, None] & (place < rank)[None, :]
    tl.store(h + tl.cast(row, tl.int64)[:, None] * rank + place[None, :], tile, mask=inside)
