"""The sines of a rotation back, made once for all layers of a step: they are given the same table."""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.numerics.rotation import HALF
from npu_patch.serving.once_per_step import OncePerTensor

_BACK = OncePerTensor()


def sines_back(sin: Tensor, pairing: str) -> Tensor:
    """`-swap(sin)`, where swap exchanges the two sines of a pair. Each layer has a view of its own of one tensor."""

    def make() -> Tensor:
        return _swap_pairs(sin, pairing).neg()

    if torch.compiler.is_compiling() or sin.requires_grad:
        return make()
    base = sin if sin._base is None else sin._base
    return _BACK.by((base,), (pairing, sin.shape, sin.stride(), sin.storage_offset()), make)


def _swap_pairs(table: Tensor, pairing: str) -> Tensor:
    if pairing == HALF:
        return table.roll(table.shape[-1] // 2, -1)
    return table.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
