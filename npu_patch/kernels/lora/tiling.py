"""Tiles of the kernels of adapters: rows (tokens) by columns, beside which an adapter's rank is small."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from npu_patch.kernels import launch

MOST = 3  # adapters of one launch
MOST_RANKS = 192  # of them together, as they are padded: what fits on chip
COLUMNS = 128  # of a tile, at most
LEAST = 16  # of a side of a tile that a matrix unit takes
MOST_RANK = 128
MOST_SPLITS = 16
LEAST_TURNS = 8  # of a split: below, adding the partial sums costs more than it saves


@functools.lru_cache(launch.KEPT)
def tiling(
    machine: launch.Machine, rows: int, width: int, rank: int, tile: launch.Tile, at_once: int = 1
) -> Mapping[str, Any]:
    """BLOCK rows by BLOCK_K columns (of the wide side) by R, STAGES of which are in flight. A program holds
    `at_once` adapters."""
    padded = padded_rank(rank)
    most = COLUMNS if padded <= 64 else COLUMNS // 2
    columns = min(most, max(LEAST, launch.power_of_two(width)))
    block = max(LEAST, _rows_of_a_tile(machine, tile, max(columns, padded), rows))
    return {
        "BLOCK": block,
        "BLOCK_K": columns,
        "R": padded,
        "STAGES": launch.stages(machine, tile),
        "num_warps": 4 if padded * at_once <= 48 else 8,
    }


def _rows_of_a_tile(machine: launch.Machine, tile: launch.Tile, columns: int, rows: int) -> int:
    """On a GPU the tile that was timed best (scripts/bench_lora_kernels.py), even if some of its cores get none."""
    if machine.device_type == "cuda":
        return min(tile.elements // columns, launch.power_of_two(rows))
    return launch.tile_rows(machine, tile, columns, rows)


def padded_rank(rank: int) -> int:
    return max(LEAST, launch.power_of_two(rank))


def splits(machine: launch.Machine, blocks: int, row_blocks: int) -> int:
    """Into how many the rows are split where `blocks` blocks of columns sum over them, to have work for every core."""
    wanted = 2 * machine.cores if machine.device_type == "cuda" else machine.cores
    return max(1, min(-(-wanted // blocks), row_blocks // LEAST_TURNS, MOST_SPLITS))


def most_together(rank: int) -> int:
    """How many adapters of one rank a launch takes; 0 where it takes none."""
    padded = padded_rank(rank)
    return 0 if padded > MOST_RANK else min(MOST, MOST_RANKS // padded)


def of_most(found: Sequence[Any], absent: Any = None) -> Sequence[Any]:
    """As many as the kernels have arguments for."""
    return found if len(found) == MOST else [*found, *[absent] * (MOST - len(found))]
