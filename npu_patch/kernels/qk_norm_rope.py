"""RMSNorm of each head of q and k, then rotary embedding, in one launch forward and one backward.

q and k come as views of what the projections return (`[B, S, H, D]` of `[B, S, H * D]`, or of one packed tensor) and
leave as attention wants them. Every element is read once and written once; all is float32 inside and rounded once.
The backward reads the inputs again and computes their norms anew, so nothing else is kept. The rotation is that of
rotate-half (https://arxiv.org/abs/2104.09864), of the first elements of a head if the table is narrower than it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.kernels import launch, qk_norm_rope_backward, qk_norm_rope_forward
from npu_patch.kernels.gamma import WEIGHT, Gamma
from npu_patch.kernels.partial_sums import sum_rows
from npu_patch.numerics.autograd import Context
from npu_patch.numerics.results import changeable
from npu_patch.numerics.rotation import HALF, table_gradients

# As tuned on an H200; heads that are rotated in part hold two kinds of tiles, which suit other sizes.
FORWARD = launch.Tile(bytes_per_element=24, elements=2048, least_bytes=24)
BACKWARD = launch.Tile(bytes_per_element=40, elements=2048, elements_per_thread=16, least_bytes=32)
PARTIAL_FORWARD = launch.Tile(bytes_per_element=24, elements=8192, elements_per_thread=64, stages=2, least_bytes=24)
PARTIAL_BACKWARD = launch.Tile(bytes_per_element=40, elements=1024, programs=8, stages=2, least_bytes=32)
TILES = (FORWARD, BACKWARD, PARTIAL_FORWARD, PARTIAL_BACKWARD)


@dataclass(frozen=True)
class QKNorm:
    """How q and k are normalized. `gamma` has a kernel; `gamma.NONE` takes no weights."""

    q_eps: float = 1e-6
    k_eps: float = 1e-6
    gamma: Gamma = WEIGHT


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """q `[B, S, H, D]` and k `[B, S, K, D]` become `[B, H, S, D]` and `[B, K, S, D]`, views of `[B, S, H, D]`.

    The weights are `[D]`, the epsilons of `norm` positive; cos and sin `[B or 1, S, R]` with even R up to D. `dtype` is
    that of the results, by default that of q and k.
    """
    return _QKNormRoPE.apply(q, k, q_weight, k_weight, cos, sin, norm, dtype)


class _QKNormRoPE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context,
        q: Tensor,
        k: Tensor,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        norm: QKNorm,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.norm = norm
        q_out, k_out = forward(q, k, q_weight, k_weight, cos, sin, norm, dtype or q.dtype)
        results = changeable(q_out.transpose(1, 2)), changeable(k_out.transpose(1, 2))
        if not any(ctx.needs_input_grad[4:6]):  # frozen heads have no gradient because the others have one
            needed = zip(results, ctx.needs_input_grad[:2], ctx.needs_input_grad[2:4], strict=True)
            ctx.mark_non_differentiable(*[each for each, *needs in needed if not any(needs)])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        needs = ctx.needs_input_grad[:4]
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs[0] else None
        dk = torch.empty(k.shape, dtype=k.dtype, device=k.device) if needs[1] else None
        outputs = dq_out.transpose(1, 2), dk_out.transpose(1, 2)
        tables: list[Tensor | None] = [None, None]
        if any(ctx.needs_input_grad[4:6]):
            rotated = [
                (outputs[0], _normalized(q, q_weight, ctx.norm.q_eps, ctx.norm.gamma)),
                (outputs[1], _normalized(k, k_weight, ctx.norm.k_eps, ctx.norm.gamma)),
            ]
            tables = [each.squeeze(2) for each in table_gradients(rotated, cos.unsqueeze(2), HALF)]
        weights = backward(*outputs, q, k, q_weight, k_weight, cos, sin, ctx.norm, dq, dk, *needs[2:])
        return dq, dk, *weights, *tables, None, None


def _normalized(x: Tensor, weight: Tensor | None, eps: float, gamma: Gamma) -> Tensor:
    """In plain torch: few tables are trained."""
    x = x.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    scale = gamma.value(weight)
    return x if scale is None else x * scale.float()


def forward(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The results as `[B, S, H, D]`, contiguous."""
    q, k, cos, sin = _adjacent(q), _adjacent(k), _adjacent(cos), _adjacent(sin)
    q_out = torch.empty(q.shape, dtype=dtype, device=q.device)
    k_out = torch.empty(k.shape, dtype=dtype, device=k.device)
    machine = launch.machine_of(q.device)
    tile = FORWARD if cos.shape[-1] == q.shape[-1] else PARTIAL_FORWARD
    tiling = _tiling(machine, q.shape, k.shape[2], cos.shape[-1], tile)
    launch.launch(
        qk_norm_rope_forward.forward, q.device, launch.programs(machine, tiling.blocks, tile),
        q, k, q_out, k_out, q_weight, k_weight, cos, sin, q.shape[1], tiling.q_blocks, tiling.k_blocks,
        *q.stride()[:3], *k.stride()[:3],
        *_table_strides(cos), *_table_strides(sin), norm.q_eps, norm.k_eps,
        num_warps=tiling.num_warps, GAMMA=norm.gamma.kernel, **tiling.constants,
    )  # fmt: skip
    return q_out, k_out


def backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    norm: QKNorm,
    dq: Tensor | None,
    dk: Tensor | None,
    needs_q_weight: bool,
    needs_k_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Fills dq and dk where given, all `[B, S, H, D]`, and returns the gradients of the two weights where needed."""
    q, k, cos, sin, dq_out, dk_out = (_adjacent(x) for x in (q, k, cos, sin, dq_out, dk_out))
    machine = launch.machine_of(q.device)
    tile = BACKWARD if cos.shape[-1] == q.shape[-1] else PARTIAL_BACKWARD
    tiling = _tiling(machine, q.shape, k.shape[2], cos.shape[-1], tile)
    needs_weights = needs_q_weight or needs_k_weight
    grid = launch.programs(machine, tiling.blocks, tile, leave_partial_sums=needs_weights)
    partial = torch.empty(grid, 2 * q.shape[-1], dtype=torch.float32, device=q.device) if needs_weights else None
    launch.launch(
        qk_norm_rope_backward.backward, q.device, grid,
        dq_out, dk_out, q, k, q_weight, k_weight, cos, sin, dq, dk, partial,
        q.shape[1], tiling.q_blocks, tiling.k_blocks,
        *dq_out.stride()[:3], *dk_out.stride()[:3],
        *q.stride()[:3], *k.stride()[:3],
        *((0, 0, 0) if dq is None else dq.stride()[:3]), *((0, 0, 0) if dk is None else dk.stride()[:3]),
        *_table_strides(cos), *_table_strides(sin), norm.q_eps, norm.k_eps,
        num_warps=tiling.num_warps, GAMMA=norm.gamma.kernel,
        NEEDS_Q=dq is not None, NEEDS_K=dk is not None, NEEDS_Q_WEIGHT=needs_q_weight, NEEDS_K_WEIGHT=needs_k_weight,
        **tiling.constants,
    )  # fmt: skip
    if partial is None:
        return None, None
    weights = q_weight if needs_q_weight else None, k_weight if needs_k_weight else None
    gamma, wanted = norm.gamma, [weight for weight in weights if weight is not None]
    sums = sum_rows(partial, gamma.summed_in(*wanted)).chunk(2)  # of one that is not wanted, numbers that nobody wrote
    found = [None if w is None else gamma.weight_gradient(d_gamma, w) for d_gamma, w in zip(sums, weights, strict=True)]
    return found[0], found[1]


# On CUDA each thread reads the cosines and sines of the heads that it holds, from the cache: read once for all heads,
# they would have to be exchanged between threads, as partly rotated heads are anyway. An Ascend core has no such cache,
# and broadcasts what it read once.
TABLES_PER_HEAD = True


@dataclass(frozen=True)
class _Tiling:
    """A tile is some tokens of one sequence by some heads of q, or of k, by half of the rotated elements."""

    q_blocks: int
    k_blocks: int
    num_warps: int
    constants: dict[str, int]

    @property
    def blocks(self) -> int:
        return self.q_blocks + self.k_blocks


@functools.lru_cache(launch.KEPT)
def _tiling(machine: launch.Machine, q: torch.Size, k_heads: int, rotary: int, tile: launch.Tile) -> _Tiling:
    batch, length, q_heads, head_dim = q
    half = launch.width(machine, rotary // 2)
    rest = launch.width(machine, head_dim - rotary) if rotary < head_dim else 0
    row = 2 * half + rest

    per_head = machine.device_type == "cuda" and TABLES_PER_HEAD and not rest

    def block(heads: int) -> tuple[int, int]:
        at_once = launch.tile_rows(machine, tile, row, batch * length * heads)
        head_block = _head_block(heads, at_once)
        return head_block, min(max(1, at_once // head_block), launch.power_of_two(length))

    (q_block, q_tokens), (k_block, k_tokens) = block(q_heads), block(k_heads)
    constants = {
        "Q_HEADS": q_heads,
        "K_HEADS": k_heads,
        "HEAD_DIM": head_dim,
        "ROTARY": rotary,
        "Q_TOKENS": q_tokens,
        "K_TOKENS": k_tokens,
        "BLOCK_Q": q_block,
        "BLOCK_K": k_block,
        "HALF": half,
        "REST": rest,
        "TABLE_Q": q_block if per_head else 1,
        "TABLE_K": k_block if per_head else 1,
        "STAGES": launch.stages(machine, tile),
    }
    q_blocks, k_blocks = (batch * launch.blocks_of(length, tokens) for tokens in (q_tokens, k_tokens))
    return _Tiling(q_blocks, k_blocks, launch.warps(tile, q_tokens * q_block * row), constants)


def _head_block(heads: int, most: int) -> int:
    """Heads in a tile, a power of two: all if they fit, else as many as fill every tile, unless that is very few."""
    block = min(launch.power_of_two(heads), most)
    while block > 4 and heads % block:
        block //= 2
    return block if heads % block == 0 else min(launch.power_of_two(heads), most)


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _table_strides(table: Tensor) -> tuple[int, int]:
    return (table.stride(0) if table.shape[0] > 1 else 0), table.stride(1)
