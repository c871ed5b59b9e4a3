"""Batched products of low precision, accumulated and given in float32.

Products of two bfloat16 or float16 numbers are exact in float32, so only the sums round.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def accumulating_bmm(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`, which is theirs or one in which `accumulates` holds."""
    return torch.bmm(a, b) if a.dtype == dtype else torch.bmm(a, b, out_dtype=dtype)


@cache
def accumulates(given: torch.dtype, wanted: torch.dtype, device_type: str) -> bool:
    """Whether this torch (from 2.8) and this device multiply `given` into `wanted`; tried once."""
    if given == wanted or wanted != torch.float32:
        return given == wanted
    one = torch.ones(1, 8, 8, dtype=given, device=device_type)
    try:
        return torch.bmm(one, one, out_dtype=wanted).dtype == wanted
    except (TypeError, RuntimeError):
        return False
