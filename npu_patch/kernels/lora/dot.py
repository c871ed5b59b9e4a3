"""Products of tiles, in float32 whatever the operands are.

Matrix units multiply half precision. A float32 operand beside a bfloat16 one is the sum of three bfloat16 parts, which
is all of its 24 bits. Of two float32 operands the first two parts of each are multiplied, all but that of their second
ones: 2^-16 of the product, for a result that is then rounded to bfloat16 or added to one that was.
"""

import torch
import triton
import triton.language as tl

from npu_patch.kernels import launch

WHOLE, IN_PARTS, IN_PARTS_APART = 0, 1, 2


def parts_of(machine: launch.Machine, dtype: torch.dtype | None) -> int:
    """PARTS for layers that multiply in `dtype`.

    Apart from what was summed before: a GPU's matrix unit cuts off, always the same way, what does not fit where it
    accumulates, which over a row of thousands is 1e-5 of the sum. An Ascend core has no room for a second sum.
    """
    if dtype != torch.bfloat16:
        return WHOLE
    return IN_PARTS if machine.device_type == "npu" else IN_PARTS_APART


@triton.jit
def add_dot(total, a, b, PARTS: tl.constexpr):
    """total + a b, for float32 and bfloat16 operands in parts, else for those of any dtype, in float32."""
    if PARTS == 0:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    elif PARTS == 1:
        total = _dot_in_parts(total, a, b)
    else:
        total += _dot_in_parts(tl.zeros_like(total), a, b)
    return total


@triton.jit
def _dot_in_parts(total, a, b):
    """The small parts first."""
    a_high = a.to(tl.bfloat16)
    b_high = b.to(tl.bfloat16)
    if a.dtype == tl.float32:
        a_rest = a - a_high.to(tl.float32)
        a_low = a_rest.to(tl.bfloat16)
        if b.dtype == tl.float32:
            total = tl.dot(a_high, (b - b_high.to(tl.float32)).to(tl.bfloat16), total)
        else:
            total = tl.dot((a_rest - a_low.to(tl.float32)).to(tl.bfloat16), b_high, total)
        total = tl.dot(a_low, b_high, total)
    elif b.dtype == tl.float32:
        b_rest = b - b_high.to(tl.float32)
        b_low = b_rest.to(tl.bfloat16)
        total = tl.dot(a_high, (b_rest - b_low.to(tl.float32)).to(tl.bfloat16), total)
        total = tl.dot(a_high, b_low, total)
    return tl.dot(a_high, b_high, total)
