"""Symmetric int8 of a weight, with a scale for each output channel."""

from __future__ import annotations

import torch
from torch import Tensor

MOST = 127
WIDER = {torch.float16: torch.float32}  # the dtype of a scale, where it is not the values'


def int8_of(values: Tensor, summed_over: int) -> tuple[Tensor, Tensor]:
    """`round(values / scale)` and the scale, of the values' dtype (float32 for float16, whose small numbers have few
    bits) and with one dimension of 1.

    It is rounded with the scale as it is stored, so that the product of the two is as near as int8 can be. No scale is
    subnormal, and that of a channel of zeros is 1.

    Raises:
        ValueError: for values that are infinite or not a number.
    """
    wide = values.to(torch.float32, copy=True)
    largest = wide.abs().amax(summed_over, keepdim=True)
    if not bool(largest.isfinite().all()):
        raise ValueError("it holds values that are infinite or not a number")
    dtype = WIDER.get(values.dtype, values.dtype)
    scale = (largest / MOST).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    return wide.div_(scale.float()).round_().clamp_(-MOST, MOST).to(torch.int8), scale
