"""The pairs that a rotation turns, and the gradients of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

HALF, INTERLEAVE = "half", "interleave"


def rotate_pairs(x: Tensor, pairing: str) -> Tensor:
    """The quarter turn: (a, b) becomes (-b, a) for each pair."""
    if pairing == HALF:
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    if pairing == INTERLEAVE:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    raise ValueError(f"pairing is {pairing!r}; accepted are {HALF!r} and {INTERLEAVE!r}")


def table_gradients(rotated: Sequence[tuple[Tensor, Tensor]], table: Tensor, pairing: str) -> tuple[Tensor, Tensor]:
    """Of cos and sin, both like `table`, from the gradient of each rotated tensor beside that tensor before it."""
    of_cos, of_sin = [], []
    for dy, x in rotated:
        dy, x = (each[..., : table.shape[-1]].to(torch.promote_types(each.dtype, torch.float32)) for each in (dy, x))
        of_cos.append((dy * x).sum_to_size(table.shape))
        of_sin.append((dy * rotate_pairs(x, pairing)).sum_to_size(table.shape))
    return reduce(torch.add, of_cos).to(table.dtype), reduce(torch.add, of_sin).to(table.dtype)
