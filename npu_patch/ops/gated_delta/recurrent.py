"""`npu_recurrent_gated_delta_rule` for a single token, or the few of a draft: taken where it is asked for, for it
rounds the state to bfloat16 after each token, as the original does not.

The cache of the model stays as it is, float32 `[B, Hv, K, V]`: the operator is given a copy, `[B, Hv, V, K]`, and what
it has written there is copied back by the cache. Four kernels with the norm of queries and keys and the cache's own.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from npu_patch.ops.constants import filled, numbered
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.step import widened
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.operators import Operator

OPERATOR = Operator("npu_recurrent_gated_delta_rule", ("beta", "scale", "actual_seq_lengths", "ssm_state_indices", "g"))
MOST_HEADS = 256
MOST_TOKENS = 8
WIDEST_HEAD = 256


def unsupported(call: RuleCall) -> str | None:
    """Limits of the operator (operator documentation), which differentiates nothing."""
    if not all(map(is_plain, call.tensors)):
        return "tensor subclass"
    if call.q.dim() != 4 or call.q.shape[1] != 1 or call.cu_seqlens is not None:
        return "more than a token of each sample"
    if call.initial_state is None:
        return "no state before it"
    if torch.is_grad_enabled() and any(each.requires_grad for each in call.tensors):
        return "gradients"
    for name, dtype in (("q", torch.bfloat16), ("k", torch.bfloat16), ("v", torch.bfloat16), ("beta", torch.bfloat16)):
        if getattr(call, name).dtype != dtype:
            return f"{name} of {getattr(call, name).dtype}"
    if call.g.dtype != torch.float32:
        return f"g of {call.g.dtype}"
    heads, widest = call.v.shape[2], max(call.k.shape[-1], call.v.shape[-1])
    if heads > MOST_HEADS or widest > WIDEST_HEAD:
        return f"{heads} heads, {widest} wide"
    return None


def run(call: RuleCall) -> tuple[Tensor, Tensor | None]:
    """The output `[B, 1, Hv, V]` and the state, bfloat16 `[B, Hv, K, V]`, the latter a view of another layout."""
    out, (state,) = run_several(call)
    return out, state if call.output_final_state else None


def run_several(call: RuleCall) -> tuple[Tensor, list[Tensor]]:
    """Of at most MOST_TOKENS tokens: the output `[B, T, Hv, V]` and the state after each, which the operator writes to
    a block of its own. In between it does not round it, as far as its documentation goes."""
    assert call.initial_state is not None
    batch, heads, width, value_width = call.initial_state.shape
    tokens = call.q.shape[1]
    q, k, v = (each.reshape(batch * tokens, 1, *each.shape[2:]) for each in (call.q, call.k, call.v))
    q, k, v = (each.contiguous() for each in widened(replace(call, q=q, k=k, v=v), torch.bfloat16, 1.0))
    states = torch.empty((batch, tokens, heads, value_width, width), dtype=torch.bfloat16, device=q.device)
    states[:, 0].copy_(call.initial_state.mT)  # a sequence starts from the block of its first token
    out = torch.ops.npu.npu_recurrent_gated_delta_rule(
        q,
        k,
        v,
        states.view(-1, heads, value_width, width),
        beta=call.beta.reshape(-1, heads).contiguous(),
        scale=width**-0.5,
        actual_seq_lengths=filled(tokens, batch, q.device, torch.int32),
        ssm_state_indices=numbered(batch * tokens, q.device),
        g=call.g.reshape(-1, heads).contiguous(),
    )
    return out.view(batch, tokens, heads, value_width), [each.mT for each in states.unbind(1)]
