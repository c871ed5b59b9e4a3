"""The negative log-likelihoods of a chunk of logits, with the gradient of the logits or with their log-probabilities:
one launch, in which each row is read twice and written once (the normalizer is summed online,
https://arxiv.org/abs/1805.02867). In float32 inside; the gradient is rounded once, to the dtype of the logits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch

TILE = launch.Tile(bytes_per_element=48, elements=8192, elements_per_thread=16)


def cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits `[N, V]` with adjacent columns and labels `[N]` in [0, V), int64, to losses `[N]`, float32, and the
    gradient of the logits, in their dtype, of the sum of `scale` `[N]` times these, or to log-probabilities."""
    (rows, columns), device = logits.shape, logits.device
    losses = torch.empty(rows, dtype=torch.float32, device=device)
    found = torch.empty(rows, columns, dtype=torch.float32 if scale is None else logits.dtype, device=device)
    planned = _planned(
        launch.machine_of(device), device, rows, columns, logits.stride(0), logits.dtype,
        None if scale is None else scale.dtype,
    )  # fmt: skip
    planned((logits, labels, scale, losses, found))
    return losses, found


@functools.lru_cache(launch.KEPT)
def _planned(
    machine: launch.Machine, device: torch.device, rows: int, columns: int, row_stride: int, dtype: torch.dtype,
    of_scale: torch.dtype | None,
) -> launch.Planned:  # fmt: skip
    block = min(launch.tile_rows(machine, TILE, 1, rows * columns), launch.power_of_two(columns))
    return launch.Planned(
        _cross_entropy,
        device,
        launch.programs(machine, rows, TILE),
        (rows, columns, row_stride),
        GRADIENT=of_scale is not None,
        BLOCK=block,
        num_warps=launch.warps(TILE, block),
    )


@triton.jit
def _cross_entropy(
    logits, labels, scale, losses, found, rows, columns, row_stride,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.arange(0, BLOCK)
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        here = logits + tl.cast(row, tl.int64) * row_stride
        label = tl.load(labels + row)
        # Of a label that is none of the vocabulary nothing is read, and loss and gradient are no numbers.
        known = (label >= 0) & (label < columns)
        of_label = tl.load(here + label, mask=known, other=float("nan")).to(tl.float32)
        greatest = float("-inf")
        total = 0.0
        for start in range(0, columns, BLOCK):
            x = tl.load(here + start + place, mask=start + place < columns, other=float("-inf")).to(tl.float32)
            next_greatest = tl.maximum(greatest, tl.max(x, 0))
            # Columns of -inf alone, of words that are masked, have no greatest to be measured from.
            base = tl.where(next_greatest == float("-inf"), 0.0, next_greatest)
            total = total * tl.exp(greatest - base) + tl.sum(tl.exp(x - base), 0)
            greatest = next_greatest
        normalizer = greatest + tl.log(total)
        tl.store(losses + row, normalizer - of_label)
        there = found + tl.cast(row, tl.int64) * columns
        if GRADIENT:
            by = tl.where(known, tl.load(scale + row).to(tl.float32), float("nan"))
        for start in range(0, columns, BLOCK):
            column = start + place
            x = tl.load(here + column, mask=column < columns, other=float("-inf")).to(tl.float32) - normalizer
            if GRADIENT:
                x = tl.exp(x) * by - tl.where(column == tl.cast(label, tl.int32), by, 0.0)  # int64s are no vectors
            tl.store(there + column, x, mask=column < columns)
