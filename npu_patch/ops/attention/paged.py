"""One new token per sequence beside keys and values in pages: `npu_fused_infer_attention_score` with a table of pages.

The limits are those of the operator's documentation for a single query. It has no backward.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_patch.ops.attention.decode import MOST_SHARED, WIDEST_HEAD
from npu_patch.serving.implementation import Implementation, is_plain, needs_operators
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

OPERATOR = Operator(
    "npu_fused_infer_attention_score",
    (
        *("block_table", "block_size", "actual_seq_lengths_kv", "num_heads", "num_key_value_heads", "scale"),
        *("input_layout", "sparse_mode", "inner_precise", "softmax_lse_flag"),
    ),
)
SCATTER = Operator("npu_scatter_pa_kv_cache", ("cache_mode",))
LENGTHS = "actual_seq_lengths_kv"  # the keyword that a captured graph renews before each replay
DTYPES = (torch.float16, torch.bfloat16)
MOST_ELEMENTS = (1 << 31) - 1  # of the cache of keys, and of that of values
WIDEST_ROW = 65535  # of all key heads together
PAGE_STEP, LARGEST_PAGE = 16, 512
MOST_HEADS = 256


@dataclass(frozen=True)
class Paged:
    """Where the keys are. `table`: int32 `[B, most pages]`, in each row the pages of a sequence, no entry below 0.
    `lengths`: how many keys each has with the new one, known on the host; `on_device`: the same, for what reads them
    there. `sink`: `[N]`, one more logit in each softmax. `softcap`: scores are `softcap * tanh(score / softcap)`."""

    scale: float
    table: Tensor
    lengths: tuple[int, ...]
    on_device: Tensor
    sink: Tensor | None = None
    softcap: float | None = None


def why_no_pages(size: int) -> str | None:
    """Why the operator takes no pages of so many tokens, or None."""
    if size % PAGE_STEP or not PAGE_STEP <= size <= LARGEST_PAGE:
        return f"pages of {size} tokens: the operator takes multiples of {PAGE_STEP} up to {LARGEST_PAGE}"
    return None


def why_no_cache(pages: Tensor, heads: int) -> str | None:
    """Why the operator does not take a cache `[pages, size, Nkv, D]` for queries of so many heads, or None."""
    count, size, key_heads, head_dim = pages.shape
    if pages.dtype not in DTYPES:
        return f"a cache of {str(pages.dtype).removeprefix('torch.')}: the operator takes float16 and bfloat16"
    if (reason := why_no_pages(size)) is not None:
        return reason
    if head_dim % 16 or head_dim > WIDEST_HEAD:
        return f"heads of {head_dim}: the operator takes multiples of 16 up to {WIDEST_HEAD}"
    if heads % key_heads or heads // key_heads > MOST_SHARED or heads > MOST_HEADS:
        return f"{heads} query heads for {key_heads} key heads: the operator takes up to {MOST_SHARED} for each"
    if key_heads * head_dim > WIDEST_ROW:
        return f"{key_heads} key heads of {head_dim}: the operator takes {WIDEST_ROW} numbers a token"
    if count * size * key_heads * head_dim > MOST_ELEMENTS:
        return "a cache of 2**31 numbers or more, which the operator does not take: num_blocks makes it smaller"
    return None


def _unsupported(query: Tensor, keys: Tensor, values: Tensor, paged: Paged) -> str | None:
    if not (is_plain(query) and is_plain(keys) and is_plain(values)):
        return "tensor subclass"
    if keys.shape != values.shape or keys.dtype != values.dtype or query.dtype != keys.dtype:
        return f"queries of {query.dtype} beside keys {list(keys.shape)} and values {list(values.shape)}"
    if paged.sink is not None or paged.softcap is not None:
        return "attention sinks" if paged.sink is not None else "softcap"
    if not (keys.is_contiguous() and values.is_contiguous()):
        return "pages that are not contiguous"
    if (reason := why_no_cache(keys, query.shape[1])) is not None:
        return reason
    size = keys.shape[1]
    if sum(-(-length // size) for length in paged.lengths) > keys.shape[0]:
        return "more pages than the cache has, shared ones counted for each sequence"
    return None


def _paged_attention(query: Tensor, keys: Tensor, values: Tensor, paged: Paged) -> Tensor:
    """query `[B, N, D]`, keys and values `[pages, size, Nkv, D]` -> `[B, N, D]`."""
    batch, heads, head_dim = query.shape
    pages, size, key_heads, _ = keys.shape
    out, _ = torch.ops.npu.npu_fused_infer_attention_score(
        query.reshape(batch, 1, heads * head_dim),
        keys.view(pages, size, key_heads * head_dim),
        values.view(pages, size, key_heads * head_dim),
        block_table=paged.table,
        block_size=size,
        actual_seq_lengths_kv=list(paged.lengths),
        num_heads=heads,
        num_key_value_heads=key_heads,
        scale=paged.scale,
        input_layout="BSH",
        sparse_mode=0,
        inner_precise=0,
        softmax_lse_flag=False,
    )
    return out.view(batch, heads, head_dim)


def exact(query: Tensor, keys: Tensor, values: Tensor, paged: Paged) -> Tensor:
    """In plain torch, reading nothing on the host: it can be captured."""
    batch, heads, head_dim = query.shape
    size, key_heads = keys.shape[1], keys.shape[2]
    rows = paged.table.long()
    own_keys, own_values = (cache[rows].flatten(1, 2).transpose(1, 2) for cache in (keys, values))  # [B, Nkv, S, D]
    grouped = query.view(batch, key_heads, heads // key_heads, head_dim)
    scores = paged.scale * (grouped @ own_keys.mT)
    if paged.softcap is not None:
        scores = paged.softcap * torch.tanh(scores / paged.softcap)
    beyond = torch.arange(rows.shape[1] * size, device=query.device) >= paged.on_device[:, None]
    scores = scores.masked_fill(beyond[:, None, None], float("-inf"))
    if paged.sink is not None:
        column = paged.sink.to(scores.dtype).view(1, key_heads, -1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, column), -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return (weights @ own_values).reshape(batch, heads, head_dim)


def _key(query: Tensor, keys: Tensor, values: Tensor, paged: Paged) -> Hashable:
    return query.shape[1] // keys.shape[2], query.shape[-1], query.dtype


PAGED_ATTENTION: Op[[Tensor, Tensor, Tensor, Paged], Tensor] = Op(
    "paged attention",
    (
        Implementation(
            "torch_npu.npu_fused_infer_attention_score",
            ("npu",),
            _paged_attention,
            _unsupported,
            needs_operators(OPERATOR),
        ),
    ),
    _key,
    exact,
)


def write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, differ: bool) -> None:
    """The new `[B, Nkv, D]` into the caches, that of sequence b at `slots[b] = page * size + row`. `differ`: no two
    slots are the same, as the operator wants it."""
    if differ and SCATTER.missing() is None:
        torch.ops.npu.npu_scatter_pa_kv_cache(
            key.contiguous(), value.contiguous(), keys, values, slots, cache_mode="Norm"
        )
        return
    keys.flatten(0, 1).index_copy_(0, slots, key)
    values.flatten(0, 1).index_copy_(0, slots, value)
