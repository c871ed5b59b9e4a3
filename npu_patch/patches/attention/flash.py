"""What stands in `AttentionInterface['flash_attention_2']`: flash attention with windows and sinks.

transformers hands padded batches over with a `[B, S]` mask and packed ones with cumulative lengths or position ids. All
become packed `[T, N, D]` tensors here, and their lengths reach the host once per step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.attention.band import FULL, Band
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.attention.checked import Attend
from npu_patch.patches.attention.sdpa import refused
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.once_per_step import HOST_READS, Ends, OncePerTensor
from npu_patch.serving.replacement import Unserved
from npu_patch.sites.sites import innermost
from npu_patch.sites.whose import is_ours

_HIDDEN = OncePerTensor()


def read_flash(function: Any) -> AsNamed | NotRead:
    """It cannot run on the CPU, so it has to be transformers' own."""
    from transformers.integrations import flash_attention

    stands = innermost(function) if is_ours(function) else function  # for paged caches
    own = stands is flash_attention.flash_attention_forward
    return AsNamed("flash attention") if own else NotRead("it is not transformers' own")


def serve(original: Callable[..., Any], device_type: str, attend: Attend) -> Callable[..., Any]:
    def serve_flash(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        max_length_q: Any = None,
        max_length_k: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None] | Unserved:
        """query `[B, N, Sq, D]`, key and value `[B, Nkv, Skv, D]` -> `[B, Sq, N, Dv]`, None."""
        if query.device.type != device_type:
            return Unserved(f"input on {query.device.type}")
        reason = refused(others)
        if reason is not None:
            return reason
        if torch.compiler.is_compiling() or not all(map(is_plain, (query, key, value))):
            return Unserved("being compiled, or a tensor subclass")
        if attention_mask is not None and not _is_padding_mask(attention_mask, query, key):
            return Unserved(f"a mask of {attention_mask.dim()} dimensions")
        dtype = target_dtype(query, module)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        queries, keys = query.shape[2], key.shape[2]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        band = _band(bool(is_causal), sliding_window, queries, keys)
        hidden: Tensor | None = None
        packed: list[Tensor] = []
        if attention_mask is not None and queries == 1 and band.within(1, attention_mask.shape[1]).is_full:
            indices, ends, band = None, None, FULL
            hidden = _hidden(attention_mask, keys)
        else:
            lengths = cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k
            packed, indices, ends = _packed(query, key, value, attention_mask, lengths, position_ids)
        if ends is None:
            decodes = queries == 1 < keys and bool(is_causal)
            attention = Attention(scale, band, hidden, sink=s_aux, dropout=dropout, decodes=decodes)
            out = attend(query, key, value, attention)
            return Unserved(out) if isinstance(out, str) else (out, None)
        attention = Attention(scale, band, sink=s_aux, dropout=dropout, ends=ends)
        out = attend(packed[0], packed[1], packed[2], attention)
        if isinstance(out, str):
            return Unserved(out)
        if indices is not None:
            padded = out.new_zeros(query.shape[0] * queries, *out.shape[1:])
            out = padded.index_copy(0, indices, out)
        return out.unflatten(0, (query.shape[0], queries)), None

    return serve_flash


def _is_padding_mask(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """`[B, S]`, with S keys (a static cache holds more) and as many queries or fewer."""
    batch, _, queries, _ = query.shape
    return is_plain(mask) and mask.dim() == 2 and len(mask) == batch and queries <= mask.shape[1] <= key.shape[2]


def target_dtype(query: Tensor, module: torch.nn.Module) -> torch.dtype:
    """transformers casts what peft left in float32 back to the dtype of the model."""
    try:
        from transformers.integrations.flash_attention import get_target_dtype
    except ImportError:  # transformers 4 has it inside its flash attention
        found: torch.dtype | None = _dtype_of_model(query, module)
    else:
        found = get_target_dtype(query, module)
    return found if found is not None and found.is_floating_point else query.dtype  # a weight's may be int8


def _dtype_of_model(query: Tensor, module: torch.nn.Module) -> torch.dtype:
    if query.dtype != torch.float32:
        return query.dtype
    if torch.is_autocast_enabled(query.device.type):
        return torch.get_autocast_dtype(query.device.type)
    config: Any = module.config
    if hasattr(config, "_pre_quantization_dtype"):
        dtype: torch.dtype = config._pre_quantization_dtype
        return dtype
    return next(layer.weight.dtype for layer in module.modules() if isinstance(layer, torch.nn.Linear))


def _band(is_causal: bool, sliding_window: int | None, queries: int, keys: int) -> Band:
    """transformers' windows include the query itself, and are symmetric where attention is not causal."""
    if sliding_window is None or keys <= sliding_window:
        return Band(after=0, bottom_right=_bottom_right()) if is_causal else FULL
    return Band(before=sliding_window - 1, after=0 if is_causal else sliding_window - 1)


def _bottom_right() -> bool:
    """NPU_FA2_SPARSE_MODE=2 asks transformers for causality aligned to the top left."""
    from transformers.integrations import npu_flash_attention

    return npu_flash_attention.SPARSE_MODE != npu_flash_attention.TOP_LEFT_ALIGNED_CAUSAL_MASK_MODE


def _flat(*tensors: Tensor) -> list[Tensor]:
    """`[B, N, S, D]` as `[B * S, N, D]`."""
    return [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]


def _packed(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, lengths: tuple[Any, ...], positions: Tensor | None
) -> tuple[list[Tensor], Tensor | None, tuple[Ends, Ends] | None]:
    """The packed tensors, the places of their tokens among padded ones, and where sequences end, None where there is
    but one per sample: in the order in which transformers looks, by padding, given lengths, position ids."""
    if mask is not None:
        return _gather(query, key, value, mask)
    if all(each is not None for each in lengths):
        query_ends, key_ends = HOST_READS.ends_of_lengths(*lengths[:2])
        return _flat(query, key, value), None, (query_ends, key_ends)
    found = _ends_of_positions(positions, query.shape[0])
    return _flat(query, key, value), None, None if found is None else (found, found)


def _hidden(mask: Tensor, keys: int) -> Tensor:
    """A padding mask `[B, S]` (true: a token) as the operator's mask of a single query, `[B, 1, 1, Skv]`: gathering the
    keys would copy the whole cache in every layer."""

    def make() -> Tensor:
        return F.pad(mask.bool().logical_not(), (0, keys - mask.shape[1]), value=True)[:, None, None]

    return _HIDDEN.by((mask,), keys, make)


def _gather(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor, tuple[Ends, Ends]]:
    """The tokens that are no padding, packed; their places among the padded queries; and where each sample ends.

    mask: `[B, Skv]`, true where there is a token; a static cache holds more keys than that.
    """
    batch, _, queries, _ = query.shape
    length = mask.shape[1]
    keys_padding = HOST_READS.padding(mask)
    key, value = (tensor[:, :, :length] for tensor in (key, value))
    if queries == length:
        places, query_ends = keys_padding.indices, keys_padding.ends
    elif queries == 1:
        places, query_ends = torch.arange(batch, device=query.device), tuple(range(1, batch + 1))
    else:  # left padding, as transformers assumes
        padding = HOST_READS.last_padding(mask, queries)
        places, query_ends = padding.indices, padding.ends
    flat_query, flat_key, flat_value = _flat(query, key, value)
    if queries != 1:
        flat_query = flat_query.index_select(0, places)
    packed = [flat_query, *(flat.index_select(0, keys_padding.indices) for flat in (flat_key, flat_value))]
    return packed, places, (query_ends, keys_padding.ends)


def _ends_of_positions(position_ids: Tensor | None, batch: int) -> Ends | None:
    """Where packed sequences end, by transformers' own reading of the position ids; None where they are not packed."""
    from transformers.modeling_flash_attention_utils import _is_packed_sequence, prepare_fa_kwargs_from_position_ids

    if position_ids is None or batch != 1 or position_ids.shape[-1] == 1:
        return None

    def read(positions: Tensor) -> Ends | None:
        if not _is_packed_sequence(positions, batch):
            return None
        (cumulative, _), _ = prepare_fa_kwargs_from_position_ids(positions)
        return tuple(cumulative.tolist()[1:])

    return HOST_READS.of_positions(position_ids, read)
