"""The backward of `qk_norm_rope` in Triton, in the tiles of its forward (`qk_norm_rope_forward`)."""

import triton
import triton.language as tl

from npu_patch.kernels.head_tiles import at_token, first_after, gammas, load_halves, places, store_sums, table


@triton.jit
def backward(
    dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, dq, dk, partial, length, q_blocks, k_blocks,
    dq_out_batch, dq_out_token, dq_out_head,
    dk_out_batch, dk_out_token, dk_out_head,
    q_batch, q_token, q_head,
    k_batch, k_token, k_head,
    dq_batch, dq_token, dq_head,
    dk_batch, dk_token, dk_head,
    cos_batch, cos_token, sin_batch, sin_token, q_eps, k_eps,
    GAMMA: tl.constexpr,
    NEEDS_Q: tl.constexpr, NEEDS_K: tl.constexpr, NEEDS_Q_WEIGHT: tl.constexpr, NEEDS_K_WEIGHT: tl.constexpr,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    Q_TOKENS: tl.constexpr, K_TOKENS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr, TABLE_Q: tl.constexpr, TABLE_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if NEEDS_Q or NEEDS_Q_WEIGHT:
        g1, g2, g3 = gammas(q_weight, GAMMA, HEAD_DIM, ROTARY, HALF, REST)
        sum1, sum2, sum3 = _zeros(BLOCK_Q, HALF, REST)
        for block in tl.range(tl.program_id(0), q_blocks, tl.num_programs(0), num_stages=STAGES):
            sum1, sum2, sum3 = _backward_tile(
                dq_out, q, dq, cos, sin, block, length,
                dq_out_batch, dq_out_token, dq_out_head,
                q_batch, q_token, q_head,
                dq_batch, dq_token, dq_head,
                cos_batch, cos_token, sin_batch, sin_token,
                q_eps, g1, g2, g3, sum1, sum2, sum3, GAMMA, NEEDS_Q, NEEDS_Q_WEIGHT,
                Q_HEADS, HEAD_DIM, ROTARY, Q_TOKENS, BLOCK_Q, HALF, REST, TABLE_Q,
            )  # fmt: skip
        if NEEDS_Q_WEIGHT:
            row = partial + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM)
            store_sums(row, sum1, sum2, sum3, HEAD_DIM, ROTARY, HALF, REST)
    if NEEDS_K or NEEDS_K_WEIGHT:
        g1, g2, g3 = gammas(k_weight, GAMMA, HEAD_DIM, ROTARY, HALF, REST)
        sum1, sum2, sum3 = _zeros(BLOCK_K, HALF, REST)
        for block in tl.range(first_after(q_blocks), k_blocks, tl.num_programs(0), num_stages=STAGES):
            sum1, sum2, sum3 = _backward_tile(
                dk_out, k, dk, cos, sin, block, length,
                dk_out_batch, dk_out_token, dk_out_head,
                k_batch, k_token, k_head,
                dk_batch, dk_token, dk_head,
                cos_batch, cos_token, sin_batch, sin_token,
                k_eps, g1, g2, g3, sum1, sum2, sum3, GAMMA, NEEDS_K, NEEDS_K_WEIGHT,
                K_HEADS, HEAD_DIM, ROTARY, K_TOKENS, BLOCK_K, HALF, REST, TABLE_K,
            )  # fmt: skip
        if NEEDS_K_WEIGHT:
            row = partial + tl.program_id(0).to(tl.int64) * (2 * HEAD_DIM) + HEAD_DIM
            store_sums(row, sum1, sum2, sum3, HEAD_DIM, ROTARY, HALF, REST)


@triton.jit
def _backward_tile(
    dy, x, dx, cos, sin, block, length,
    dy_batch, dy_token, dy_head,
    x_batch, x_token, x_head,
    dx_batch, dx_token, dx_head,
    cos_batch, cos_token, sin_batch, sin_token,
    eps, g1, g2, g3, sum1, sum2, sum3, GAMMA: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_WEIGHT: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, TABLE_HEADS: tl.constexpr,
):  # fmt: skip
    """With n = x * rstd and d = the rotation back of dy: d gamma = sum d n, dx = rstd (d gamma - n mean(d gamma n))."""
    sequence, token, left = at_token(block, length, BLOCK_T)
    cos += sequence * cos_batch + token * cos_token
    sin += sequence * sin_batch + token * sin_token
    c1, c2 = table(cos, cos_token, left, ROTARY, BLOCK_T, TABLE_HEADS, HALF)
    s1, s2 = table(sin, sin_token, left, ROTARY, BLOCK_T, TABLE_HEADS, HALF)
    x += sequence * x_batch + token * x_token
    dy += sequence * dy_batch + token * dy_token
    if NEEDS_X:
        dx += sequence * dx_batch + token * dx_token
    for start in range(0, HEADS, BLOCK_H):
        here, inside = places(x_token, x_head, start, left, ROTARY // 2, HEADS, BLOCK_T, BLOCK_H, HALF)
        x1, x2 = load_halves(x + here, inside, ROTARY)
        there, inside = places(dy_token, dy_head, start, left, ROTARY // 2, HEADS, BLOCK_T, BLOCK_H, HALF)
        y1, y2 = load_halves(dy + there, inside, ROTARY)
        d1 = y1 * c1 + y2 * s2
        d2 = y2 * c2 - y1 * s1
        squares = tl.sum(x1 * x1 + x2 * x2, 2)
        if REST > 0:
            here3, inside3 = places(x_token, x_head, start, left, HEAD_DIM - ROTARY, HEADS, BLOCK_T, BLOCK_H, REST)
            x3 = tl.load(x + here3 + ROTARY, mask=inside3, other=0.0).to(tl.float32)
            there3, inside3 = places(dy_token, dy_head, start, left, HEAD_DIM - ROTARY, HEADS, BLOCK_T, BLOCK_H, REST)
            d3 = tl.load(dy + there3 + ROTARY, mask=inside3, other=0.0).to(tl.float32)
            squares += tl.sum(x3 * x3, 2)
        rstd = tl.rsqrt(squares * (1.0 / HEAD_DIM) + eps)[:, :, None]
        x1 = x1 * rstd
        x2 = x2 * rstd
        if NEEDS_WEIGHT:
            sum1 += tl.sum(d1 * x1, 0)
            sum2 += tl.sum(d2 * x2, 0)
        if GAMMA > 0:
            d1 = d1 * g1[None, None, :]
            d2 = d2 * g2[None, None, :]
        along = tl.sum(d1 * x1 + d2 * x2, 2)
        if REST > 0:
            x3 = x3 * rstd
            if NEEDS_WEIGHT:
                sum3 += tl.sum(d3 * x3, 0)
            if GAMMA > 0:
                d3 = d3 * g3[None, None, :]
            along += tl.sum(d3 * x3, 2)
        if NEEDS_X:
            mean = (along * (1.0 / HEAD_DIM))[:, :, None]
            back, inside = places(dx_token, dx_head, start, left, ROTARY // 2, HEADS, BLOCK_T, BLOCK_H, HALF)
            tl.store(dx + back, rstd * (d1 - x1 * mean), mask=inside)
            tl.store(dx + back + ROTARY // 2, rstd * (d2 - x2 * mean), mask=inside)
            if REST > 0:
                back, inside = places(dx_token, dx_head, start, left, HEAD_DIM - ROTARY, HEADS, BLOCK_T, BLOCK_H, REST)
                tl.store(dx + back + ROTARY, rstd * (d3 - x3 * mean), mask=inside)
    return sum1, sum2, sum3


@triton.jit
def _zeros(BLOCK_H: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr):
    first = tl.zeros([BLOCK_H, HALF], tl.float32)
    second = tl.zeros([BLOCK_H, HALF], tl.float32)
    rest = tl.zeros([BLOCK_H, REST if REST > 0 else 1], tl.float32)
    return first, second, rest
