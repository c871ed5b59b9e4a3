"""What stands in `AttentionMaskInterface['sdpa']`: masks that need not be written out stay patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.attention_mask import Band
from npu_patch.ops.implementation import is_plain
from npu_patch.patches.mask_pattern import Pattern, PatternMask, plain, read_mask_function
from npu_patch.patches.packing import HOST_READS
from npu_patch.patches.patch import Context, Unfused, Unserved


def serve(original: Callable[..., Any], context: Context) -> Callable[..., Any]:
    def serve_mask(*args: Any, **arguments: Any) -> PatternMask | Unserved | Unfused | None:
        device = torch.device(arguments.get("device", "cpu"))
        if args or "q_length" not in arguments or "mask_function" not in arguments:
            return Unserved("arguments of another version of transformers")
        if device.type != context.device_type:
            return Unserved(f"a mask on {device.type}")
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        pattern = _pattern(**arguments)
        if isinstance(pattern, Unserved):
            made = original(**{name: plain(value) for name, value in arguments.items()})
            # That no mask is needed is what a mask that is never written out is for: nothing fell through.
            return None if made is None else Unfused(made, pattern.reason)
        shape = (arguments["batch_size"], 1, arguments["q_length"], arguments["kv_length"])
        written_out = arguments | {"allow_is_causal_skip": False}
        return PatternMask(shape, device, pattern, lambda: original(**written_out))

    return serve_mask


def serve_packing(original: Callable[..., Any], context: Context) -> Callable[..., Any]:
    def find_packed_sequence_indices(position_ids: Any) -> Tensor | Unserved | None:
        if not isinstance(position_ids, Tensor) or not is_plain(position_ids) or torch.compiler.is_compiling():
            return Unserved("position ids that cannot be read")
        if position_ids.device.type != context.device_type:
            return Unserved(f"position ids on {position_ids.device.type}")
        if position_ids.dim() != 2 or position_ids.is_floating_point() or position_ids.numel() == 0:
            return Unserved(f"position ids of shape {tuple(position_ids.shape)}, {position_ids.dtype}")
        return HOST_READS.packed_indices(position_ids)

    return find_packed_sequence_indices


def _pattern(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **others: Any,
) -> Pattern | Unserved:
    """The mask's pattern, from arguments of transformers' `sdpa_mask`.

    Reads the padding mask once, as transformers does for masks that it can leave out, and nothing else.
    """
    if q_length == 1:
        return Unserved("a mask for one query is small")
    if isinstance(q_offset, Tensor):
        return Unserved("a static cache, whose length is on the device")
    reading = read_mask_function(mask_function)
    if reading is None:
        return Unserved("a mask function that is no band")
    if q_offset - kv_offset != kv_length - q_length:
        return Unserved("keys beyond the last query")
    # The mask function compares positions that are offset for queries and for keys.
    band = Band(reading.before, reading.after)
    if reading.packed_indices is None:
        if reading.by_position:
            return Unserved("a band of unknown positions")
        limited = band.within(q_length, kv_length)
        if limited.is_full or (allow_is_causal_skip and q_length == kv_length and limited.is_causal):
            return Unserved("a mask for padding")
        if attention_mask is not None and not _shows_everything(attention_mask, kv_length, kv_offset):
            return Unserved("padding")
        return Pattern(band)
    ends = HOST_READS.ends_of_packed(reading.packed_indices)
    if ends is None or q_length != kv_length or attention_mask is not None:
        return Unserved("packed sequences of unknown lengths")
    return Pattern(band, ends)


def _shows_everything(attention_mask: Tensor, kv_length: int, kv_offset: int) -> bool:
    """Whether a padding mask `[B, S]` hides none of the keys."""
    shown = attention_mask[:, kv_offset : kv_offset + kv_length]
    return shown.shape[-1] == kv_length and bool(shown.all())
