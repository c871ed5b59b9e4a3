"""Gated delta rule for inference: npu_chunk_gated_delta_rule and npu_recurrent_gated_delta_rule.

Source: torch_npu's operator documentation and the CANN kernels (ops-transformer). Neither has a derivative: torch_npu
warns in backward and the gradient is undefined.

    S_t = exp(g_t) * S_{t-1} @ (I - beta_t k_t k_t^T) + beta_t v_t k_t^T;    o_t = S_t @ (scale * q_t)
"""

from typing import Any

import torch
from torch import Tensor

from ..refusal import given, require, require_contiguous, require_dtype
from .kernel import Kernel

BF16 = (torch.bfloat16,)
MOST_HEADS = 64
WIDEST_HEAD = 128
MOST_DECODED = 8


def npu_chunk_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    actual_seq_lengths: Tensor | None = None,
    scale: float | None = None,
    g: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Packed sequences from their initial states: out [T, Nv, Dv] and the final states, bfloat16.

    query, key: bfloat16 [T, Nk, Dk], normalised by the caller; value: bfloat16 [T, Nv, Dv]; beta: bfloat16 [T, Nv]
    within 0 and 1; g: float32 [T, Nv] within -1 and 0; initial_state: bfloat16 [B, Nv, Dv, Dk]; actual_seq_lengths:
    int32 [B], the lengths themselves, on the device. All are needed, except g. Contiguous. Nk divides Nv.
    """
    name = "npu_chunk_gated_delta_rule"
    beta = given(beta, name, "beta is needed")
    initial_state = given(initial_state, name, "initial_state is needed")
    actual_seq_lengths = given(actual_seq_lengths, name, "actual_seq_lengths is needed")
    scale = given(scale, name, "scale is needed")
    _check(name, query, key, value, beta, g, initial_state)
    _check_lengths(name, actual_seq_lengths, query.shape[0])
    require(
        initial_state.shape[0] == actual_seq_lengths.numel(),
        name,
        f"initial_state {list(initial_state.shape)} must have {actual_seq_lengths.numel()} states, one per sequence",
    )
    if g is not None:
        require(bool((g >= -1).all() and (g <= 0).all()), name, f"g must be within -1 and 0, not down to {g.min():g}")
    # bfloat16 rounds a sigmoid near 1 to 1, so the ends of the documented open interval are allowed.
    require(bool((beta >= 0).all() and (beta <= 1).all()), name, "beta must be within 0 and 1")
    out = torch.empty_like(value)
    states = initial_state.clone()
    start = 0
    for index, length in enumerate(actual_seq_lengths.tolist()):
        state = initial_state[index].float()
        for token in range(start, start + length):
            out[token], state = _step(state, query[token], key[token], value[token], beta[token], _at(g, token), scale)
        states[index] = state.to(states.dtype)
        start += length
    return out, states


def npu_recurrent_gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    *,
    beta: Tensor | None = None,
    scale: float | None = None,
    actual_seq_lengths: Tensor | None = None,
    ssm_state_indices: Tensor | None = None,
    num_accepted_tokens: Tensor | None = None,
    g: Tensor | None = None,
    gk: Tensor | None = None,
) -> Tensor:
    """A few tokens of each sequence, on a pool of states [blocks, Nv, Dv, Dk] bfloat16 that is changed in place.

    Shapes and dtypes as npu_chunk_gated_delta_rule; at most 8 tokens a sequence. ssm_state_indices: int32 [T], the
    block that holds the state after each token. A sequence starts from the block of its first token, or of its last
    accepted one (num_accepted_tokens, int32 [B]). Returns out [T, Nv, Dv].
    """
    name = "npu_recurrent_gated_delta_rule"
    beta = given(beta, name, "beta is needed")
    scale = given(scale, name, "scale is needed")
    actual_seq_lengths = given(actual_seq_lengths, name, "actual_seq_lengths is needed")
    ssm_state_indices = given(ssm_state_indices, name, "ssm_state_indices is needed")
    require(gk is None, name, "gk is not simulated")
    _check(name, query, key, value, beta, g, state)
    _check_lengths(name, actual_seq_lengths, query.shape[0])
    require_dtype(name, "ssm_state_indices", ssm_state_indices, (torch.int32,))
    if g is not None:
        require(bool((g <= 0).all()), name, "g must not be positive")
    out = torch.empty_like(value)
    start = 0
    for index, length in enumerate(actual_seq_lengths.tolist()):
        require(length <= MOST_DECODED, name, f"at most {MOST_DECODED} tokens a sequence, not {length}")
        if not length:
            continue
        first = start if num_accepted_tokens is None else start + int(num_accepted_tokens[index]) - 1
        current = state[int(ssm_state_indices[first])].float()
        for token in range(start, start + length):
            out[token], current = _step(
                current, query[token], key[token], value[token], beta[token], _at(g, token), scale
            )
            state[int(ssm_state_indices[token])] = current.to(state.dtype)
        start += length
    return out


def npu_recurrent_gated_delta_rule_functional(
    query: Tensor, key: Tensor, value: Tensor, state: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    """npu_recurrent_gated_delta_rule on a copy of the states: out and the states."""
    states = state.clone()
    return npu_recurrent_gated_delta_rule(query, key, value, states, **options), states


def _step(
    state: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """One token: state float32 [Nv, Dv, Dk], q and k [Nk, Dk], v [Nv, Dv], beta and g [Nv]."""
    group = v.shape[0] // k.shape[0]
    q, k = q.float().repeat_interleave(group, 0), k.float().repeat_interleave(group, 0)
    if g is not None:
        state = state * g.exp()[:, None, None]
    predicted = (state @ k[..., None]).squeeze(-1)
    change = beta.float()[:, None] * (v.float() - predicted)
    state = state + change[..., None] * k[:, None, :]
    return (state @ (scale * q)[..., None]).squeeze(-1).to(v.dtype), state


def _at(g: Tensor | None, token: int) -> Tensor | None:
    return None if g is None else g[token]


def _check(name: str, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, g: Tensor | None, state: Tensor) -> None:
    tensors = {"query": query, "key": key, "value": value, "beta": beta, "state": state}
    for argument, tensor in tensors.items():
        require_dtype(name, argument, tensor, BF16)
        require_contiguous(name, argument, tensor)
    if g is not None:
        require_dtype(name, "g", g, (torch.float32,))
        require_contiguous(name, "g", g)
    require(
        query.dim() == key.dim() == value.dim() == 3 and query.shape == key.shape and query.shape[0] == value.shape[0],
        name,
        f"query and key must be [T, Nk, Dk] and value [T, Nv, Dv], not {list(query.shape)}, {list(key.shape)}, "
        f"{list(value.shape)}",
    )
    (_, key_heads, key_width), (tokens, heads, width) = key.shape, value.shape
    require(
        heads <= MOST_HEADS and heads % key_heads == 0,
        name,
        f"Nv must be a multiple of Nk and at most {MOST_HEADS}, not Nv={heads}, Nk={key_heads}",
    )
    require(
        max(key_width, width) <= WIDEST_HEAD,
        name,
        f"Dk and Dv must be at most {WIDEST_HEAD}, not {key_width} and {width}",
    )
    for argument, tensor in (("beta", beta), *([] if g is None else [("g", g)])):
        require(
            tuple(tensor.shape) == (tokens, heads),
            name,
            f"{argument} must be [T, Nv] = {[tokens, heads]}, not {list(tensor.shape)}",
        )
    require(
        tuple(state.shape[1:]) == (heads, width, key_width),
        name,
        f"the state must be [.., Nv, Dv, Dk] = [.., {heads}, {width}, {key_width}], not {list(state.shape)}",
    )


def _check_lengths(name: str, lengths: Tensor, tokens: int) -> None:
    require_dtype(name, "actual_seq_lengths", lengths, (torch.int32,))
    require(
        int(lengths.sum()) == tokens,
        name,
        f"actual_seq_lengths must be lengths that add up to T={tokens}, not {lengths.tolist()}",
    )


KERNELS = {
    "npu_chunk_gated_delta_rule": Kernel(npu_chunk_gated_delta_rule),
    "npu_recurrent_gated_delta_rule": Kernel(npu_recurrent_gated_delta_rule),
    "npu_recurrent_gated_delta_rule_functional": Kernel(npu_recurrent_gated_delta_rule_functional),
}
