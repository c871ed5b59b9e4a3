"""The weight that int8 values and their scales stand for."""

from __future__ import annotations

from torch import Tensor

from npu_patch.ops.weight_format import as_rows


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 `[..., N, K]` times scale `[..., N, 1]`, in the dtype of the scale."""
    return as_rows(weight).to(scale.dtype).mul_(scale)
