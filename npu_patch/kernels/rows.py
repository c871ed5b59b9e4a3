"""Tiles of whole rows, for kernels that treat every row of `[..., D]` alike."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from npu_patch.kernels import launch


def rows_of(x: Tensor) -> Tensor:
    """`[..., D]` as `[rows, D]` with adjacent columns: a view wherever one is possible."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def row_tiling(rows: Tensor, tile: launch.Tile, leave_partial_sums: bool = False) -> tuple[int, Mapping[str, Any]]:
    """The grid, and BLOCK rows by BLOCK_D columns of a tile, STAGES of which are in flight."""
    return _row_tiling(launch.machine_of(rows.device), *rows.shape, tile, leave_partial_sums)


@functools.lru_cache(launch.KEPT)
def _row_tiling(
    machine: launch.Machine, rows: int, width: int, tile: launch.Tile, leave_partial_sums: bool
) -> tuple[int, Mapping[str, Any]]:
    block_d = launch.width(machine, width)
    block = launch.tile_rows(machine, tile, block_d, rows)
    grid = launch.programs(machine, -(-rows // block), tile, leave_partial_sums)
    constants = {"BLOCK": block, "BLOCK_D": block_d, "STAGES": launch.stages(machine, tile)}
    return grid, constants | {"num_warps": launch.warps(tile, block * block_d)}
