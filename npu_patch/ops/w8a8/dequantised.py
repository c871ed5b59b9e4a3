"""The weight that int8 values and their scales stand for."""

from __future__ import annotations

from torch import Tensor


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 `[..., N, K]` times scale `[..., N, 1]`, in the dtype of the scale."""
    return weight.to(scale.dtype).mul_(scale)
