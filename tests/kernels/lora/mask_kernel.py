"""Writes the mask of a dropout, which the kernels of adapters keep nowhere."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.mask import draws, keeps


def mask(seed: Tensor, index: int, rows: int, width: int, dropout: float, block: int = 32) -> Tensor:
    """Of the adapter `index` of a group: `[rows, width]`, in tiles of `block` by `block`."""
    kept = torch.empty(rows, width, dtype=torch.int32, device=seed.device)
    grid = triton.cdiv(rows, block) * triton.cdiv(width, block)
    launch.launch(_mask, kept.device, grid, seed, kept, rows, width, dropout, INDEX=index, BLOCK=block)
    return kept.bool()


@triton.jit
def _mask(seed, kept, rows, width, drops, INDEX: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    tile = keeps(draws(tl.load(seed), row, column), drops, INDEX)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(kept + row[:, None] * width + column[None, :], tile.to(tl.int32), mask=inside)
