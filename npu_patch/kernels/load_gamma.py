"""What multiplies a normalized row, as kernels make it: by the number `kernel` of `gamma.GAMMAS`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_gamma(weight, columns, mask, GAMMA: tl.constexpr):
    """Gamma at `columns`, float32, for any number but 0, which loads nothing."""
    loaded = tl.load(weight + columns, mask=mask, other=0.0)
    gamma = loaded.to(tl.float32)
    if GAMMA > 1:
        gamma = gamma + 1.0
    if GAMMA == 3:  # summed in the weight's dtype
        gamma = gamma.to(loaded.dtype).to(tl.float32)
    return gamma
