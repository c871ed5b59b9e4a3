"""The gated delta rule of linear attention (https://arxiv.org/abs/2412.06464), over chunks and token by token.

The algebra is in algebra.py. Arguments are laid out as in flash-linear-attention and in transformers: q and k
`[B, T, Hk, K]`, v `[B, T, Hv, V]`, g (the logarithm of the decay, at most 0) and beta `[B, T, Hv]`, states
`[B, Hv, K, V]`; Hk divides Hv, and value head h has key head h // (Hv / Hk). q is scaled by K ** -0.5. cu_seqlens:
cumulative lengths `[N + 1]` of N sequences packed along T, with B = 1; states, given and final, are then
`[N, Hv, K, V]`, one a sequence. Its values are never read on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.numerics.autograd import Context
from npu_patch.numerics.results import changeable
from npu_patch.ops.gated_delta import algebra
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.chunks import Problem
from npu_patch.ops.gated_delta.layout import boundaries, layout_for
from npu_patch.ops.gated_delta.step import step, steps

UNIT_KEY = 1024.0
"""A power of two that survives `x * rsqrt(x² + 1e-6)` as 1 within 5e-13."""


@dataclass(frozen=True)
class Tiling:
    """Tokens in a chunk, a power of two, and chunks in a group of the scan (None: as makes its steps fewest)."""

    chunk: int = 64
    group: int | None = None


def chunk_gated_delta_rule(call: RuleCall, tiling: Tiling = Tiling()) -> tuple[Tensor, Tensor | None]:
    """The output `[B, T, Hv, V]` in the dtype of q and, if asked, the final states in float32 (else None).

    Computes in float32, in float64 if q is float64. Raises ValueError for shapes that do not fit.
    """
    _check(call)
    if call.cu_seqlens is not None and call.initial_state is not None:
        return _from_states_as_tokens(call, call.initial_state, call.cu_seqlens, tiling)
    return _chunked(call, tiling)


def gated_delta_rule(call: RuleCall) -> tuple[Tensor, Tensor | None]:
    """The same; a single token is a step without chunks."""
    if call.q.shape[1] != 1 or call.cu_seqlens is not None:
        return chunk_gated_delta_rule(call)
    _check(call)
    with _no_autocast(call.q):
        return step(call)


def several_tokens(call: RuleCall) -> tuple[Tensor, list[Tensor]]:
    """The same for a few tokens, one after the other, with the state after each."""
    _check(call)
    with _no_autocast(call.q):
        return steps(call)


def _chunked(call: RuleCall, tiling: Tiling) -> tuple[Tensor, Tensor | None]:
    tensors = call.q, call.k, call.v, call.g, call.beta, call.initial_state, call.cu_seqlens
    return _ChunkGatedDeltaRule.apply(*tensors, call.normalize, tiling, call.output_final_state)


class _ChunkGatedDeltaRule(torch.autograd.Function):
    """Keeps the arguments, the inverses and the few states between groups of chunks, and makes everything else again
    for the backward."""

    @staticmethod
    def forward(ctx: Context, *given: Any) -> tuple[Tensor, Tensor | None]:
        """`given`: what `_problem` takes, and whether the final states are wanted."""
        *arguments, wants_final = given
        problem = _problem(*arguments)
        ctx.set_materialize_grads(False)
        ctx.options = arguments[7:]
        with _no_autocast(problem.q):
            o, final, kept = algebra.forward(problem, wants_final, any(ctx.needs_input_grad))
        if kept is not None:
            ctx.save_for_backward(*arguments[:7], *kept)
        return changeable(o), None if final is None else changeable(final)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, do: Tensor | None, d_final: Tensor | None) -> tuple[Tensor | None, ...]:
        *arguments, inverse, entering_groups = ctx.saved_tensors
        if do is None and d_final is None:
            return (None,) * 10
        problem = _problem(*arguments, *ctx.options)
        with _no_autocast(problem.q):
            kept = algebra.Kept(inverse, entering_groups)
            gradients = algebra.backward(problem, kept, do, d_final, ctx.needs_input_grad[:6])
        return *gradients, None, None, None, None


def _no_autocast(x: Tensor) -> torch.autocast:
    """Autocast would round the operands of every product."""
    return torch.autocast(x.device.type, enabled=False)


def _problem(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    tiling: Tiling,
) -> Problem:
    layout = layout_for(q.shape[1], tiling.chunk, tiling.group, q.device.type)
    dtype = torch.promote_types(q.dtype, torch.float32)
    bounds = None if cu_seqlens is None else boundaries(cu_seqlens, layout, dtype)
    return Problem(q, k, v, g, beta, initial_state, normalize, layout, bounds, dtype)


def _from_states_as_tokens(
    call: RuleCall, initial_state: Tensor, cu_seqlens: Tensor, tiling: Tiling
) -> tuple[Tensor, Tensor | None]:
    """Packed sequences that start from states. A state is what K tokens write whose keys are the unit vectors, with
    beta 1 and no decay: they are put before each sequence, exactly, and their outputs dropped."""
    q, key_heads = call.q, call.k.shape[2]
    sequences, heads, width, value_width = initial_state.shape
    dtype = torch.promote_types(torch.promote_types(q.dtype, initial_state.dtype), torch.float32)
    bounds = cu_seqlens.long()
    position = torch.arange(q.shape[1], device=q.device)
    own = position + width * (torch.searchsorted(bounds[1:].contiguous(), position, right=True) + 1)
    before = bounds[:-1, None] + width * torch.arange(sequences, device=q.device)[:, None]
    before = (before + torch.arange(width, device=q.device)).flatten()

    def merged(tokens: Tensor, of_states: Tensor | float) -> Tensor:
        shape = (1, q.shape[1] + sequences * width, *tokens.shape[2:])
        if isinstance(of_states, float):
            out = torch.full(shape, of_states, dtype=dtype, device=q.device)
        else:
            out = torch.empty(shape, dtype=dtype, device=q.device).index_copy(1, before, of_states.to(dtype))
        return out.index_copy(1, own, tokens.to(dtype))

    unit = UNIT_KEY if call.normalize else 1.0
    unit_keys = unit * torch.eye(width, dtype=dtype, device=q.device)[None, :, None]
    unit_keys = unit_keys.expand(sequences, -1, key_heads, -1).reshape(1, -1, key_heads, width)
    state_values = initial_state.permute(0, 2, 1, 3).reshape(1, -1, heads, value_width)
    shifted = bounds + width * torch.arange(sequences + 1, device=q.device)
    tokens = RuleCall(
        merged(q, 0.0),
        merged(call.k, unit_keys),
        merged(call.v, state_values),
        merged(call.g, 0.0),
        merged(call.beta, 1.0),
        output_final_state=call.output_final_state,
        normalize=call.normalize,
        cu_seqlens=shifted,
    )
    o, final = _chunked(tokens, tiling)
    return o.index_select(1, own).to(q.dtype), final


def _check(call: RuleCall) -> None:
    q, k, v, g, beta = call.q, call.k, call.v, call.g, call.beta
    initial_state, cu_seqlens = call.initial_state, call.cu_seqlens
    if q.dim() != 4 or q.shape != k.shape or v.dim() != 4 or q.shape[:2] != v.shape[:2] or v.shape[2] % k.shape[2]:
        raise ValueError(
            "q and k must be [B, T, Hk, K] and v [B, T, Hv, V] with Hk dividing Hv, not "
            f"{list(q.shape)}, {list(k.shape)}, {list(v.shape)}"
        )
    if g.shape != v.shape[:3] or beta.shape != v.shape[:3]:
        raise ValueError(f"g and beta must be {list(v.shape[:3])}, not {list(g.shape)} and {list(beta.shape)}")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(f"with cu_seqlens the batch must be 1, not {q.shape[0]}")
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    expected = (states, v.shape[2], k.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"the initial state must be {list(expected)}, not {list(initial_state.shape)}")
