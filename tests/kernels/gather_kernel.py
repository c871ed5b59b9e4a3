"""A kernel that must fall back to scalar loops on Ascend: the compile check is checked with it."""

import triton
import triton.language as tl


@triton.jit
def gather(x, index, y, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + tl.load(index + place)))
