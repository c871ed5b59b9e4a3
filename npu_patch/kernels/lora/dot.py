"""Products of tiles, in float32 whatever the operands are.

Matrix units multiply half precision. A float32 operand beside a bfloat16 one is the sum of three bfloat16 parts, which
is all of its 24 bits. Of two float32 operands the first two parts of each are multiplied, all but that of their second
ones: 2^-16 of the product, for a result that is then rounded to bfloat16 or added to one that was.
"""

import triton
import triton.language as tl


@triton.jit
def add_dot(total, a, b, SPLITS: tl.constexpr):
    """total + a b, for float32 and bfloat16 operands where SPLITS, else for those of any dtype, in float32."""
    if SPLITS:
        a_high = a.to(tl.bfloat16)
        b_high = b.to(tl.bfloat16)
        total = tl.dot(a_high, b_high, total)
        if a.dtype == tl.float32:
            a_rest = a - a_high.to(tl.float32)
            a_low = a_rest.to(tl.bfloat16)
            total = tl.dot(a_low, b_high, total)
            if b.dtype != tl.float32:
                total = tl.dot((a_rest - a_low.to(tl.float32)).to(tl.bfloat16), b_high, total)
        if b.dtype == tl.float32:
            b_rest = b - b_high.to(tl.float32)
            b_low = b_rest.to(tl.bfloat16)
            total = tl.dot(a_high, b_low, total)
            if a.dtype != tl.float32:
                total = tl.dot(a_high, (b_rest - b_low.to(tl.float32)).to(tl.bfloat16), total)
    else:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return total
