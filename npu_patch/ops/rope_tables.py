"""cos and sin in the forms that rotations take, each made once for all layers of a step, which are given the same."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

from npu_patch.numerics.rotation import HALF
from npu_patch.serving.once_per_step import OncePerTensor, made_apart

Tables = tuple[Tensor, Tensor]
MOST = 2  # tables of a step: layers that see a window have others than the rest


class _Kept(NamedTuple):
    cos: weakref.ref[Tensor]
    sin: weakref.ref[Tensor]
    of: tuple[int, int, int]  # the dimension, and how often each was written to
    tables: Tables


_KEPT: list[_Kept] = []
_BACK = OncePerTensor()


def for_heads(cos: Tensor, sin: Tensor, dimension: int) -> Tables:
    """With a dimension of one head. In one frame: it is asked for at each call."""
    if (
        torch.compiler.is_compiling()
        or cos.requires_grad
        or sin.requires_grad  # trained
        or cos.is_inference()
        or sin.is_inference()  # nobody counts what is written to them
    ):
        return cos.unsqueeze(dimension), sin.unsqueeze(dimension)
    of = dimension, cos._version, sin._version
    for kept in _KEPT:
        if kept.cos() is cos and kept.sin() is sin and kept.of == of:
            return kept.tables
    # A view would hold what it is of, which is let go of with its step.
    tables = made_apart(lambda: (cos.unsqueeze(dimension).data, sin.unsqueeze(dimension).data))
    _KEPT[MOST - 1 :] = []
    _KEPT.insert(0, _Kept(weakref.ref(cos, _forget), weakref.ref(sin, _forget), of, tables))
    return tables


def _forget(_: Any) -> None:
    _KEPT[:] = [kept for kept in _KEPT if kept.cos() is not None and kept.sin() is not None]


def sines_back(sin: Tensor, pairing: str) -> Tensor:
    """Those of the rotation back, `-swap(sin)`, where swap exchanges the two sines of a pair."""

    def make() -> Tensor:
        return _swap_pairs(sin, pairing).neg()

    if torch.compiler.is_compiling() or sin.requires_grad or sin.is_inference():
        return make()
    return _BACK.by((sin,), pairing, make)


def _swap_pairs(table: Tensor, pairing: str) -> Tensor:
    if pairing == HALF:
        return table.roll(table.shape[-1] // 2, -1)
    return table.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
