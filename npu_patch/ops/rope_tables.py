"""cos and sin in the forms that rotations take, each made once for all layers of a step, which are given the same."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.numerics.rotation import HALF
from npu_patch.serving.once_per_step import OncePerTensor

Tables = tuple[Tensor, Tensor]
_FOR_HEADS, _BACK = OncePerTensor(), OncePerTensor()


def for_heads(cos: Tensor, sin: Tensor, dimension: int) -> Tables:
    """With a dimension of one head."""
    if not _can_be_kept(cos, sin):
        return cos.unsqueeze(dimension), sin.unsqueeze(dimension)
    # A view would hold what it is of, which is let go of with its step.
    return _FOR_HEADS.by((cos, sin), dimension, lambda: (cos.unsqueeze(dimension).data, sin.unsqueeze(dimension).data))


def sines_back(sin: Tensor, pairing: str) -> Tensor:
    """Those of the rotation back, `-swap(sin)`, where swap exchanges the two sines of a pair."""

    def make() -> Tensor:
        return _swap_pairs(sin, pairing).neg()

    return _BACK.by((sin,), pairing, make) if _can_be_kept(sin) else make()


def _swap_pairs(table: Tensor, pairing: str) -> Tensor:
    if pairing == HALF:
        return table.roll(table.shape[-1] // 2, -1)
    return table.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def _can_be_kept(*tables: Tensor) -> bool:
    """Not what is trained, nor what nobody counts the changes of."""
    if torch.compiler.is_compiling():
        return False
    return not [table for table in tables if table.requires_grad or table.is_inference()]
