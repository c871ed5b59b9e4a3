"""Gamma: what an RMSNorm multiplies a normalized row by, made from its weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NONE = "none"


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


# By name, for a weight `[D]`. "weight" keeps its dtype: the operators take it as it is.
GAMMAS: dict[str, Callable[[Tensor], Tensor]] = {
    "weight": lambda weight: weight,
    # In float32: in bfloat16 the sum would lose up to 8 bits of a weight near zero.
    "1 + weight": lambda weight: 1.0 + _widened(weight),
    "rounded 1 + weight": lambda weight: _widened(1.0 + weight),
}


def gamma_of(name: str, weight: Tensor | None) -> Tensor | None:
    """None for a norm without."""
    return None if name == NONE else GAMMAS[name](weight)
