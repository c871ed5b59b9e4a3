"""What stands around `AttentionInterface['flash_attention_2']` where transformers hands a paged cache over.

Steps of single tokens come with a table of pages: `npu_fused_infer_attention_score` reads them where they are. All
others gather keys and values from the cache, and are packed sequences whose ends the scheduler knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.attention import paged as pages
from npu_patch.ops.attention.band import FULL, Band
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.paged import Paged
from npu_patch.patches.attention.checked import Attend
from npu_patch.patches.attention.flash import target_dtype
from npu_patch.patches.inference.continuous_batching.step import Step, running
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.replacement import TakenOver, Unfused, Unserved

TABLE, READ, QUERIES, KEYS = "block_table", "read_index", "cu_seq_lens_q", "cu_seq_lens_k"


@dataclass(frozen=True)
class Serving:
    paged: Dispatch
    packed: Attend
    calls: Calls
    device_type: str


def serve(original: Callable[..., Any], serving: Serving) -> Callable[..., Any]:
    def paged(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        cache: Any = None,
        **batch: Any,
    ) -> Any:
        """query `[1, N, S, D]`, key and value `[1, Nkv, S, D]` -> `[1, S, N, D]`, None."""
        asked = _Asked(module, scaling, sliding_window, softcap, is_causal, s_aux, dropout)
        step = running()
        if step is None:
            return Unserved("a paged cache outside of its ModelRunner")
        if query.device.type != serving.device_type:
            return Unserved(f"input on {query.device.type}")
        if torch.compiler.is_compiling() or not all(map(is_plain, (query, key, value))):
            return Unserved("being compiled, or a tensor subclass")
        query = query.to(target_dtype(query, module))
        key, value = key.to(cache.dtype), value.to(cache.dtype)
        if batch.get(TABLE) is not None:
            return _decode(serving, step, asked, (query, key, value), cache, batch)
        return _packed(original, serving, step, asked, (query, key, value), cache, batch)

    def serve_flash(*args: Any, **kwargs: Any) -> Any:
        return TakenOver(original(*args, **kwargs)) if kwargs.get("cache") is None else paged(*args, **kwargs)

    return serve_flash


@dataclass(frozen=True)
class _Asked:
    module: Any
    scaling: float | None
    sliding_window: int | None
    softcap: float | None
    is_causal: bool | None
    s_aux: Tensor | None
    dropout: float

    def keywords(self) -> dict[str, Any]:
        named = ("scaling", "sliding_window", "softcap", "is_causal", "s_aux", "dropout")
        return {name: getattr(self, name) for name in named}

    def scale(self, query: Tensor) -> float:
        return query.shape[-1] ** -0.5 if self.scaling is None else self.scaling


def _decode(
    serving: Serving, step: Step, asked: _Asked, states: tuple[Tensor, ...], cache: Any, batch: dict[str, Any]
) -> Any:
    query, key, value = (each[0].transpose(0, 1) for each in states)  # [B, N, D]
    allocator = cache.layer_to_allocator[asked.module.layer_idx]
    keys, values = allocator.get_cache_for_block_table(asked.module.layer_idx)
    rows, size = query.shape[0], keys.shape[1]
    made = step.once(
        (TABLE, allocator.index),
        lambda: _places(batch[TABLE][allocator.index], batch[KEYS][allocator.layer_type], rows, size),
    )
    pages.write(key, value, keys, values, made.slots, differ=rows <= size)
    paged = Paged(asked.scale(query), made.table, step.lengths, made.lengths, asked.s_aux, asked.softcap)
    implementation = serving.paged.serving(serving.calls, query, keys, values, paged)
    if isinstance(implementation, str):
        return Unfused((pages.exact(query, keys, values, paged)[None], None), implementation)
    return implementation.run(query, keys, values, paged)[None], None


@dataclass(frozen=True)
class _Places:
    table: Tensor
    slots: Tensor
    lengths: Tensor


def _places(table: Tensor, key_ends: Tensor, rows: int, size: int) -> _Places:
    """Where the new tokens go, on the device. A row that only pads writes to the first page, which nobody owns, and
    each to a slot of its own there as long as the page has one for each."""
    before = (key_ends[1 : rows + 1] - key_ends[:rows] - 1).long()  # -1 of a row that only pads
    table = table[:rows].clamp(min=0)
    page, row = before.clamp(min=0) // size, before.clamp(min=0) % size
    slots = table.long().gather(1, page[:, None])[:, 0] * size + row
    own = torch.arange(rows, device=table.device) % size
    return _Places(table, torch.where(before < 0, own, slots), (before + 1).clamp(min=1))


def _packed(
    original: Callable[..., Any],
    serving: Serving,
    step: Step,
    asked: _Asked,
    states: tuple[Tensor, ...],
    cache: Any,
    batch: dict[str, Any],
) -> Any:
    """Graphs pad: what is beyond the last sequence is written where nobody reads, and computes nothing."""
    query, key, value = states
    layer = asked.module.layer_idx
    allocator = cache.layer_to_allocator[layer]
    ends = step.query_ends, step.key_ends[allocator.layer_type]
    rows, last = ends[0][-1], ends[1][-1]
    if rows == 0:  # a step between a prompt and its copies for the others of its group, where steps overlap
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3]), None
    given = dict(batch)
    given[READ] = [index[: last if each is allocator else None] for each, index in _indices(cache, batch)]
    key, value = cache.update(key_states=key, value_states=value, layer_idx=layer, kwargs=given)
    padding = query.shape[2] - rows
    query, key, value = query[:, :, :rows], key[:, :, :last], value[:, :, :last]
    queries, keys, values = (each[0].transpose(0, 1) for each in (query, key, value))
    if asked.softcap is None:
        attention = Attention(asked.scale(query), _band(asked, ends), sink=asked.s_aux, ends=ends)
        out = serving.packed(queries, keys, values, attention)
    else:
        out = "softcap"
    if not isinstance(out, str):
        return F.pad(out, (0, 0, 0, 0, 0, padding))[None], None
    # The cache is written already: what is left is the original's attention without it.
    result, _ = original(asked.module, query, key, value, None, **asked.keywords(), cache=None, **given)
    return Unfused((F.pad(result, (0, 0, 0, 0, 0, padding)), None), out)


def _indices(cache: Any, batch: dict[str, Any]) -> list[tuple[Any, Tensor]]:
    return list(zip(cache.cache_allocators.values(), batch[READ], strict=True))


def _band(asked: _Asked, ends: tuple[tuple[int, ...], tuple[int, ...]]) -> Band:
    """transformers' windows include the query itself."""
    causal = getattr(asked.module, "is_causal", True) if asked.is_causal is None else asked.is_causal
    if not causal:
        return FULL
    longest = max(end - start for start, end in zip((0, *ends[1]), ends[1], strict=False))
    window = asked.sliding_window
    return Band(after=0) if window is None or longest <= window else Band(before=window - 1, after=0)
