"""The forward of `qk_norm_rope` in Triton. A tile: some tokens of a sequence by some heads by half of what is rotated.

A head is held as the first half of its rotated elements, the second half, and the rest, each a tile of its own, so that
rotate-half moves nothing. The offset of a block is one int64; offsets within it are int32. The blocks of k are numbered
after those of q, and dealt to the programs in turn: tiles of both are full, however few heads k has.
"""

import triton
import triton.language as tl

from npu_patch.kernels.head_tiles import at_token, first_after, gammas, load_halves, places, table


@triton.jit
def forward(
    q, k, q_out, k_out, q_weight, k_weight, cos, sin, length, q_blocks, k_blocks,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    cos_batch, cos_token, sin_batch, sin_token, q_eps, k_eps,
    GAMMA: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    Q_TOKENS: tl.constexpr, K_TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TABLE_Q: tl.constexpr, TABLE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    g1, g2, g3 = gammas(q_weight, GAMMA, HEAD_DIM, ROTARY, HALF, REST)
    for block in tl.range(tl.program_id(0), q_blocks, tl.num_programs(0), num_stages=STAGES):
        _forward_tile(
            q, q_out, cos, sin, block, length,
            q_batch, q_token, q_head, cos_batch, cos_token, sin_batch, sin_token,
            q_eps, g1, g2, g3, GAMMA, Q_HEADS, HEAD_DIM, ROTARY, Q_TOKENS, BLOCK_Q, HALF, REST, TABLE_Q,
        )  # fmt: skip
    g1, g2, g3 = gammas(k_weight, GAMMA, HEAD_DIM, ROTARY, HALF, REST)
    for block in tl.range(first_after(q_blocks), k_blocks, tl.num_programs(0), num_stages=STAGES):
        _forward_tile(
            k, k_out, cos, sin, block, length,
            k_batch, k_token, k_head, cos_batch, cos_token, sin_batch, sin_token,
            k_eps, g1, g2, g3, GAMMA, K_HEADS, HEAD_DIM, ROTARY, K_TOKENS, BLOCK_K, HALF, REST, TABLE_K,
        )  # fmt: skip


@triton.jit
def _forward_tile(
    x, y, cos, sin, block, length,
    x_batch, x_token, x_head, cos_batch, cos_token, sin_batch, sin_token,
    eps, g1, g2, g3, GAMMA: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    sequence, token, left = at_token(block, length, BLOCK_T)
    cos += sequence * cos_batch + token * cos_token
    sin += sequence * sin_batch + token * sin_token
    c1, c2 = table(cos, cos_token, left, ROTARY, BLOCK_T, TABLE_HEADS, HALF)
    s1, s2 = table(sin, sin_token, left, ROTARY, BLOCK_T, TABLE_HEADS, HALF)
    x += sequence * x_batch + token * x_token
    y += (sequence * length + token) * (HEADS * HEAD_DIM)
    for start in range(0, HEADS, BLOCK_H):
        here, inside = places(x_token, x_head, start, left, ROTARY // 2, HEADS, BLOCK_T, BLOCK_H, HALF)
        x1, x2 = load_halves(x + here, inside, ROTARY)
        squares = tl.sum(x1 * x1 + x2 * x2, 2)
        if REST > 0:
            here3, inside3 = places(x_token, x_head, start, left, HEAD_DIM - ROTARY, HEADS, BLOCK_T, BLOCK_H, REST)
            x3 = tl.load(x + here3 + ROTARY, mask=inside3, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, 2)
        rstd = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)[:, :, None]
        x1 = x1 * rstd
        x2 = x2 * rstd
        if GAMMA > 0:
            x1 = x1 * g1[None, None, :]
            x2 = x2 * g2[None, None, :]
        there, inside = places(HEADS * HEAD_DIM, HEAD_DIM, start, left, ROTARY // 2, HEADS, BLOCK_T, BLOCK_H, HALF)
        tl.store(y + there, x1 * c1 - x2 * s1, mask=inside)
        tl.store(y + there + ROTARY // 2, x2 * c2 + x1 * s2, mask=inside)
        if REST > 0:
            x3 = x3 * rstd
            if GAMMA > 0:
                x3 = x3 * g3[None, None, :]
            there, inside = places(
                HEADS * HEAD_DIM, HEAD_DIM, start, left, HEAD_DIM - ROTARY, HEADS, BLOCK_T, BLOCK_H, REST
            )
            tl.store(y + there + ROTARY, x3, mask=inside)
