"""A single token of the gated delta rule, in as few kernels as torch has for it: ten, with a state, on an NPU; six for
each more of several that are computed one after the other.

Both queries and keys are `x / sqrt(K x² + K eps)` here, as one RMSNorm makes them, so shorter than unit vectors by the
factor K ** -0.5 that queries are to have anyway; what keys lack of it are scalars that the other kernels take.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from npu_patch.ops.constants import filled
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.chunks import NORM_EPS
from npu_patch.ops.rms_norm import NPU_RMS_NORM


def step(call: RuleCall) -> tuple[Tensor, Tensor | None]:
    """The output `[B, 1, Hv, V]` in the dtype of q and, if asked, the state after it; the one before is left alone."""
    o, (state,) = steps(call)
    return o, state if call.output_final_state else None


def steps(call: RuleCall) -> tuple[Tensor, list[Tensor]]:
    """Of several tokens, one after the other, `[B, T, Hv, V]` and the state after each: bit by bit what as many steps
    give, for casts, lengths and decays are made for all tokens at once, and row by row."""
    batch, tokens, key_heads, width = call.k.shape
    heads, value_width = call.v.shape[2:]
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    root = float(width) ** 0.5
    if tokens > 1:
        q, k, v = (each.reshape(batch * tokens, 1, *each.shape[2:]) for each in (call.q, call.k, call.v))
        q, k, v = widened(replace(call, q=q, k=k, v=v), dtype, 1.0 / root)
    else:
        q, k, v = widened(call, dtype, 1.0 / root)
    shape = batch, tokens, key_heads, heads // key_heads
    # A key head serves several value heads: products over an axis of one, which none of them copies.
    q, k = (x.view(batch, tokens, key_heads, 1, 1, width) for x in (q, k))
    v, beta = v.view(*shape, 1, value_width), call.beta.reshape(*shape, 1, 1)
    kept = call.g.reshape(*shape, 1, 1).exp().to(dtype) if tokens > 1 or call.initial_state is not None else None
    state = None if call.initial_state is None else call.initial_state.to(dtype)
    outputs, states = [], []
    for at in range(tokens):
        if state is None:
            state = k[:, at].mT * (v[:, at] * beta[:, at]).mul(root)
        else:
            assert kept is not None
            decayed = state.reshape(batch, *shape[2:], width, value_width) * kept[:, at]
            written = torch.sub(v[:, at], k[:, at] @ decayed, alpha=root) * beta[:, at]
            state = torch.addcmul(decayed, k[:, at].mT, written, value=root)
        outputs.append((q[:, at] @ state).view(batch, 1, heads, value_width))
        states.append(state.view(batch, heads, width, value_width))
    return (torch.cat(outputs, 1) if tokens > 1 else outputs[0]).to(call.q.dtype), states


def widened(call: RuleCall, dtype: torch.dtype, length: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `[B, Hk, K]`, of this length where they are to be normalized and else times it, and values
    `[B, Hv, V]`."""
    batch, _, key_heads, width = call.k.shape
    heads, value_width = call.v.shape[2:]
    whole = _side_by_side(call.q, call.k, call.v)
    if whole is None:
        qk, v = torch.cat((call.q, call.k), 2).flatten(1).to(dtype), call.v.to(dtype)
    else:
        whole = whole.to(dtype)
        qk, v = whole.split((2 * key_heads * width, heads * value_width), -1)
        if value_width == width and batch > 1:
            qk = whole  # rows of values among them: the norm of all is a kernel, where a copy of some were another
    qk = qk.reshape(batch, -1, width)
    if call.normalize:
        qk = _normalized(qk, length)
    elif length != 1.0:
        qk = qk * length
    return qk[:, :key_heads], qk[:, key_heads : 2 * key_heads], v.reshape(batch, heads, value_width)


def _normalized(x: Tensor, length: float) -> Tensor:
    """x / sqrt(x² + eps) * length."""
    width = x.shape[-1]
    if x.device.type == "npu" and x.dtype in (torch.float32, torch.bfloat16) and NPU_RMS_NORM.missing() is None:
        gamma = filled(length * width**-0.5, width, x.device)
        normalized: Tensor = torch.ops.npu.npu_rms_norm(x, gamma, epsilon=NORM_EPS / width)[0]
        return normalized
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPS).mul(length)


def _side_by_side(*tensors: Tensor) -> Tensor | None:
    """The rows `[B, ...]` of which tensors `[B, 1, H, W]` are the parts, one after the other, as a model splits what
    its convolution gives; None where they are none, or where gradients are to find their way."""
    first = tensors[0]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return None
    offset = first.storage_offset()
    for x in tensors:
        rows = x.stride()[2:] == (x.shape[3], 1) and (x.stride(0) == first.stride(0) or x.shape[0] == 1)
        same = x.untyped_storage()._cdata == first.untyped_storage()._cdata and x.dtype == first.dtype
        if not (rows and same and x.storage_offset() == offset):
            return None
        offset += x.shape[2] * x.shape[3]
    return first.as_strided((first.shape[0], offset - first.storage_offset()), (first.stride(0), 1))
