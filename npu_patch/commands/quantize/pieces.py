"""Tensors that are read a piece at a time, of whole rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from npu_patch.checkpoints.safetensors_file import ITEM_BYTES, Entry

PIECE = 8 * 2**20  # bytes that are read at once, but for a row that cannot be cut
VALUE = torch.Size(())  # for a row, where any values do


def rows_at_once(entry: Entry, row: torch.Size) -> int:
    return max(1, PIECE // max(1, row.numel() * ITEM_BYTES[entry.dtype]))


def in_pieces(entry: Entry, row: torch.Size = VALUE, step: int | None = None) -> Iterator[torch.Size]:
    """Shapes of what is read one after the other. `step`: rows of each, in place of as many as a piece has."""
    rows = entry.size // ITEM_BYTES[entry.dtype] // max(1, row.numel())
    step = step or rows_at_once(entry, row)
    for first in range(0, rows, step):
        yield torch.Size((min(step, rows - first), *row))
