"""Results of an autograd function, as its caller may have those of an operator."""

from __future__ import annotations

import torch
from torch import Tensor


def changeable(result: Tensor) -> Tensor:
    """`result` of a function's forward, to be changed in place by whoever gets it: autograd forbids that for a view of
    what was computed (heads seen as `[B, N, S, D]`), not for the same memory without a base."""
    if torch.compiler.is_compiling() or not result._is_view():
        return result
    return result.data


def in_dtype(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # to() costs the host something where it does nothing, too
