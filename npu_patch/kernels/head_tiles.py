"""Tiles of some tokens by some heads by a part of a head, and what belongs to them: blocks, tables and gammas."""

import triton
import triton.language as tl

from npu_patch.kernels.load_gamma import load_gamma


@triton.jit
def first_after(blocks):
    """This program's first block of those that are dealt out after `blocks` others."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - blocks % programs) % programs


@triton.jit
def at_token(block, length, BLOCK_T: tl.constexpr):
    """The sequence of a block and its first token in it, for offsets; and how many tokens are left from there on."""
    per_sequence = tl.cdiv(length, BLOCK_T)
    sequence = tl.cast(block // per_sequence, tl.int64)
    first = (block % per_sequence) * BLOCK_T
    left = length - first
    return sequence, tl.cast(first, tl.int64), left


@triton.jit
def places(
    token_stride, head_stride, start, left, columns,
    HEADS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Offsets and mask of a tile `[BLOCK_T, BLOCK_H, WIDTH]` of heads from `start` on."""
    token = tl.arange(0, BLOCK_T)[:, None, None]
    head = start + tl.arange(0, BLOCK_H)[None, :, None]
    column = tl.arange(0, WIDTH)[None, None, :]
    return token * token_stride + head * head_stride + column, (token < left) & (head < HEADS) & (column < columns)


@triton.jit
def load_halves(here, inside, ROTARY: tl.constexpr):
    """float32 tiles of the first and of the second half of what is rotated."""
    first = tl.load(here, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(here + ROTARY // 2, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def table(
    table, token_stride, left,
    ROTARY: tl.constexpr, BLOCK_T: tl.constexpr, TABLE_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """The two halves of cos or sin, float32 `[BLOCK_T, TABLE_HEADS, HALF]`, the same for every head."""
    token = tl.arange(0, BLOCK_T)[:, None, None]
    head = tl.arange(0, TABLE_HEADS)[None, :, None]
    column = tl.arange(0, HALF)[None, None, :]
    here = table + token * token_stride + head * 0 + column
    return load_halves(here, (token < left) & (head < TABLE_HEADS) & (column < ROTARY // 2), ROTARY)


@triton.jit
def gammas(
    weight,
    GAMMA: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Gamma of the first half, the second half and the rest; zeros, unused, where there is none."""
    first = tl.zeros([HALF], tl.float32)
    second = tl.zeros([HALF], tl.float32)
    rest = tl.zeros([REST if REST > 0 else 1], tl.float32)
    if GAMMA > 0:
        column = tl.arange(0, HALF)
        inside = column < ROTARY // 2
        first = load_gamma(weight, column, inside, GAMMA)
        second = load_gamma(weight + ROTARY // 2, column, inside, GAMMA)
        if REST > 0:
            column = tl.arange(0, REST)
            rest = load_gamma(weight + ROTARY, column, column < HEAD_DIM - ROTARY, GAMMA)
    return first, second, rest


@triton.jit
def store_sums(
    row, sum1, sum2, sum3,
    HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, HALF)
    tl.store(row + column, tl.sum(sum1, 0), mask=column < ROTARY // 2)
    tl.store(row + ROTARY // 2 + column, tl.sum(sum2, 0), mask=column < ROTARY // 2)
    if REST > 0:
        column = tl.arange(0, REST)
        tl.store(row + ROTARY + column, tl.sum(sum3, 0), mask=column < HEAD_DIM - ROTARY)
