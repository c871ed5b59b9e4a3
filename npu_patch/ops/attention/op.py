"""The attention op: who computes it, its definition, and the form of a call, for each of which kernels have a path:
each kind of mask, packed sequences, a bias, single queries with a cache.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from npu_patch.ops.attention import decode as attention_decode
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.fusion import IMPLEMENTATION
from npu_patch.ops.attention.padding import PADDED
from npu_patch.serving.op import Op

SINGLE, SINGLE_MASKED = "single query", "single query, masked"  # the inference operator's


def _key(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Hashable:
    shared = query.shape[1] // key.shape[1]  # query heads that share a key head
    form, sinks = _form(query, key, value, attention), attention.sink is not None
    return form, sinks, shared, query.shape[-1], value.shape[-1], query.dtype


def _form(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> str:
    if attention.ends is not None:
        return "packed"
    if attention_decode.serves(query, key, value, attention):
        return SINGLE if attention.hidden is None else SINGLE_MASKED
    if attention.bias is not None:
        return "bias"
    if attention.hidden is not None:
        return "mask"
    band = attention.band.within(query.shape[2], key.shape[2])
    if band.is_full:
        return "full"
    if band.is_causal:
        square = query.shape[2] == key.shape[2]
        return "causal" if square or not band.bottom_right else "causal to the last key"
    return "window"


def _exact(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """`[B, Sq, N, Dv]`, packed `[T, N, Dv]`, in plain torch."""
    ends = attention.ends
    if ends is not None:
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    queries, keys, key_heads = query.shape[2], key.shape[2], key.shape[1]
    grouped = query.unflatten(1, (key_heads, -1)).flatten(2, 3)  # heads that share a key head, one below the other
    scores = attention.scale * (grouped @ key.mT).view(*query.shape[:3], keys)
    if attention.bias is not None:
        scores = scores + attention.bias
    seen = attention.band.visible(queries, keys)
    if ends is not None:
        sequence = torch.bucketize(torch.arange(keys), torch.tensor(ends[1]), right=True)
        seen = seen & (sequence[:, None] == sequence)
    if attention.hidden is not None:
        seen = seen & ~attention.hidden
    scores = scores.masked_fill(~seen, float("-inf"))
    if attention.sink is not None:
        column = attention.sink.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    out = (weights.view(*grouped.shape[:3], keys) @ value).view(*query.shape[:3], -1).transpose(1, 2)
    return out if ends is None else out[0]


ATTENTION = Op("attention", (*PADDED, IMPLEMENTATION), _key, _exact)
