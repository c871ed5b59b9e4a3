"""Writes the mask of a dropout, which the kernels of adapters keep nowhere."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora.mask import draws, keeps


def mask(
    seed: int | Tensor, index: int, rows: int, width: int, dropout: float, block: int = 32, device: str = "cpu"
) -> Tensor:
    """Of the adapter `index` of a group: `[rows, width]`, in tiles of `block` by `block`."""
    kept = torch.empty(rows, width, dtype=torch.int32, device=device)
    grid = triton.cdiv(rows, block) * triton.cdiv(width, block)
    constants = {"INDEX": index, "LOADED": isinstance(seed, Tensor), "BLOCK": block}
    launch.launch(_mask, kept.device, grid, kept, seed, rows, width, dropout, **constants)
    return kept.bool()


@triton.jit
def _mask(kept, seed, rows, width, drops, INDEX: tl.constexpr, LOADED: tl.constexpr, BLOCK: tl.constexpr):
    across = tl.cdiv(width, BLOCK)
    row = tl.program_id(0) // across * BLOCK + tl.arange(0, BLOCK)
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    tile = keeps(draws(seed, row, column, LOADED), drops, INDEX)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(kept + row[:, None] * width + column[None, :], tile.to(tl.int32), mask=inside)
