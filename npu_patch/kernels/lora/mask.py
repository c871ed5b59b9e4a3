"""The masks of a group's dropouts, from a seed and an element's place: made wherever they are needed, kept nowhere.

A counter-based generator in 32-bit integers. Rows and columns are hashed on their own, an element mixes the product of
its two hashes, and an adapter multiplies that by an odd number of its own and compares the high bits. That is four
operations a tile and three a mask, where Philox takes a hundred, and a high product for which the vector unit of an
Ascend core has no instruction.
"""

import triton
import triton.language as tl


@triton.jit
def draws(seed, row, column, LOADED: tl.constexpr):
    """`[rows, columns]` of uint32, which the masks of a tile have in common. `seed`: of a group, an int64, which is
    LOADED where it is in the device's memory."""
    if LOADED:
        seed = tl.load(seed)
    low = (seed & 0xFFFFFFFF).to(tl.uint32)
    high = (seed >> 32).to(tl.uint32)
    of_row = _hashed(_hashed(row.to(tl.uint32) + low) + high) | 1
    of_column = _hashed(_hashed(column.to(tl.uint32) ^ high ^ 0x9E3779B9) + low) | 1
    drawn = of_row[:, None] * of_column[None, :]
    return drawn ^ (drawn >> 16)


@triton.jit
def keeps(drawn, drops, INDEX: tl.constexpr):
    """Which elements the adapter of that index keeps: each but with probability `drops`. As float32, which is what the
    vector unit compares, and to whose 24 bits the probability is met."""
    if INDEX == 0:
        drawn = drawn * 0x846CA68B
    elif INDEX == 1:
        drawn = drawn * 0x7FEB352D
    else:
        drawn = drawn * 0xC2B2AE35
    return drawn.to(tl.int32, bitcast=True).to(tl.float32) >= drops * 4294967296.0 - 2147483648.0


@triton.jit
def _hashed(x):
    """A bijection of uint32, of which each bit changes half of the bits: lowbias32 of hash-prospector."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)
