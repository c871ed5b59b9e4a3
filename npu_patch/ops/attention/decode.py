"""One new token per sample beside a cache: `npu_fused_infer_attention_score`, which has no backward and keeps nothing
for one. No training step has this shape; it may have single queries without a cache (attention pooling, prompts of one
token), which stay with the operator that they are trained with.

Beyond 512 keys some releases ignore a bool mask `[., 1, 1, S]` without a word; a bias with all heads, `[., N, 1, S]`,
is right there at every length (https://github.com/vllm-project/vllm-ascend/issues/15503). So longer masks go as a bias.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from npu_patch.serving.once_per_step import OncePerTensor
from npu_patch.serving.operators import Operator

if TYPE_CHECKING:
    from npu_patch.ops.attention.call import Attention

OPERATOR = Operator(
    "npu_fused_infer_attention_score",
    (
        *("atten_mask", "pse_shift", "num_heads", "num_key_value_heads", "scale", "input_layout"),
        *("sparse_mode", "inner_precise", "softmax_lse_flag"),
    ),
)
MOST_SHARED = 64  # query heads per key head
WIDEST_HEAD = 512
LONGEST_MASK = 512  # keys
_MASKS = OncePerTensor()  # for all layers of a step
HIDDEN = -30000.0  # as a score: nothing is left of it, in float16 too, and no minus infinity makes a NaN


def serves(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> bool:
    """Limits of the operator for a single query (operator documentation): float16 and bfloat16, heads a multiple of 16
    wide, contiguous keys and values. It differentiates nothing: torch_npu would warn and leave the gradients out."""
    if not attention.decodes or query.shape[2] != 1 or query.dtype not in (torch.float16, torch.bfloat16):
        return False
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        return False
    if attention.bias is not None or attention.sink is not None or attention.dropout:
        return False
    head_dim = query.shape[3]
    return (
        OPERATOR.missing() is None
        and attention.band.within(1, key.shape[2]).is_full
        and (attention.hidden is None or attention.hidden.shape[1] == 1)
        and head_dim % 16 == 0
        and head_dim <= WIDEST_HEAD
        and value.shape[3] == head_dim
        and query.shape[1] <= MOST_SHARED * key.shape[1]
        and key.is_contiguous()
        and value.is_contiguous()
    )


def decode(query: Tensor, key: Tensor, value: Tensor, attention: Attention) -> Tensor:
    """query `[B, N, 1, D]`, key and value `[B, Nkv, Skv, D]` -> `[B, 1, N, D]`."""
    mask, bias = (None, None) if attention.hidden is None else _mask_and_bias(query, key.shape[2], attention.hidden)
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query.contiguous(),
        key,
        value,
        atten_mask=mask,
        pse_shift=bias,
        num_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        scale=attention.scale,
        input_layout="BNSD",
        sparse_mode=0,
        inner_precise=0,
        softmax_lse_flag=False,
    )
    return out.transpose(1, 2).contiguous()


def _mask_and_bias(query: Tensor, keys: int, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the operator takes of a mask, with a row for each sample. Each layer has a view of its own of one tensor."""

    def make() -> tuple[Tensor | None, Tensor | None]:
        if keys <= LONGEST_MASK:
            return hidden.expand(len(query), 1, 1, keys).contiguous(), None
        return None, query.new_zeros(*query.shape[:3], keys).masked_fill_(hidden, HIDDEN)

    if torch.compiler.is_compiling():
        return make()
    base = hidden if hidden._base is None else hidden._base
    view = hidden.shape, hidden.stride(), hidden.storage_offset()
    return _MASKS.by((base,), (view, query.shape[:2], query.dtype, keys), make)
