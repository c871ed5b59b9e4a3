"""Rows in int8, each with a scale of its own: symmetric, by the largest magnitude of the row at run time.

scale = max |x| / 127        values = round(x / scale), half to even
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MOST = 127


class Quantised(NamedTuple):
    """`values`: int8 `[M, K]`; `scale`: float32 `[M]`, 0 for a row of zeros."""

    values: Tensor
    scale: Tensor


def by_token(x: Tensor) -> Quantised:
    """x `[M, K]` in any floating dtype, computed in float32 as npu_dynamic_quant does."""
    wide = x.float()
    scale = wide.abs().amax(-1) / MOST
    values = wide / torch.where(scale > 0, scale, 1.0)[:, None]
    return Quantised(values.round_().to(torch.int8), scale)
