"""What stands in `AttentionMaskInterface['sdpa']`: masks that need not be written out stay patterns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.attention.band import Band
from npu_patch.patches.attention.checked import Attend
from npu_patch.serving.implementation import is_plain
from npu_patch.serving.once_per_step import HOST_READS
from npu_patch.serving.read_in_forward import running
from npu_patch.serving.replacement import TakenOver, Unfused, Unserved
from npu_patch.waiting.contract import materialised
from npu_patch.waiting.masks import Pattern, PatternMask, read_mask_function

PADDING = "attention_mask"


def serve(original: Callable[..., Any], device_type: str, attend: Attend) -> Callable[..., Any]:
    def serve_mask(*args: Any, **arguments: Any) -> PatternMask | Unserved | Unfused | None:
        queries = None if args or "mask_function" not in arguments else _queries(arguments)
        if queries is None:
            return Unserved("arguments of another version of transformers")
        if queries.device.type != device_type:
            return Unserved(f"a mask on {queries.device.type}")
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        if queries.offset is None:
            return Unserved("tokens in the cache, whose number is on the device")
        others = {name: value for name, value in arguments.items() if name not in ("q_length", "q_offset")}
        pattern = _pattern(q_length=queries.length, q_offset=queries.offset, **others)
        if isinstance(pattern, Unserved):
            made = original(**_answered(materialised(arguments, "the original"), queries))
            # That no mask is needed is what a mask that is never written out is for: nothing fell through.
            return None if made is None else Unfused(made, pattern.reason)
        shape = (arguments["batch_size"], 1, queries.length, arguments["kv_length"])
        written_out = arguments | {"allow_is_causal_skip": False}
        return PatternMask(shape, queries.device, pattern, lambda: original(**written_out))

    return serve_mask


def _answered(arguments: dict[str, Any], queries: _Queries) -> dict[str, Any]:
    """Of a padding mask that the host has read, it need not ask the device whether it hides anything."""
    mask = arguments.get(PADDING)
    forward = running()
    if forward is None or not isinstance(mask, Tensor) or queries.length != arguments["kv_length"]:
        return arguments
    read = forward.known(mask)
    if read is None or read.shape[-1] != queries.length:
        return arguments
    return arguments | ({PADDING: None} if bool(read.all()) else {"allow_is_causal_skip": False})


def serve_preparing(original: Callable[..., Any], device_type: str, attend: Attend) -> Callable[..., Any]:
    """Of a padding mask that the host has read, it knows the truth values too."""

    def prepare(*args: Any, **kwargs: Any) -> TakenOver:
        prepared = original(*args, **kwargs)
        given, made = kwargs.get(PADDING, args[2] if len(args) > 2 else None), prepared[1]
        forward = None if torch.compiler.is_compiling() else running()
        if forward is not None and isinstance(given, Tensor) and isinstance(made, Tensor) and made is not given:
            read = forward.known(given)
            if read is not None and made.shape == given.shape:
                forward.same_as(made, read.bool())
        return TakenOver(prepared)

    return prepare


def serve_packing(original: Callable[..., Any], device_type: str, attend: Attend) -> Callable[..., Any]:
    def find_packed_sequence_indices(position_ids: Any) -> Tensor | Unserved | None:
        if not isinstance(position_ids, Tensor) or not is_plain(position_ids) or torch.compiler.is_compiling():
            return Unserved("position ids that cannot be read")
        if position_ids.device.type != device_type:
            return Unserved(f"position ids on {position_ids.device.type}")
        if position_ids.dim() != 2 or position_ids.is_floating_point() or position_ids.numel() == 0:
            return Unserved(f"position ids of {position_ids.dim()} dimensions, {position_ids.dtype}")
        return HOST_READS.packed_indices(position_ids)

    return find_packed_sequence_indices


@dataclass(frozen=True)
class _Queries:
    """How many queries there are, and how many tokens come before them; None if that is known on the device only."""

    length: int
    offset: int | None
    device: torch.device


def _queries(arguments: dict[str, Any]) -> _Queries | None:
    """From arguments of transformers' `sdpa_mask`: `q_length` and `q_offset` or, up to 5.3, `cache_position`."""
    if "q_length" in arguments:
        offset = arguments.get("q_offset", 0)
        known = None if isinstance(offset, Tensor) else offset
        device = arguments.get("device", "cpu")
        if not isinstance(device, torch.device):  # which the compiler of torch 2.9 cannot trace
            device = torch.device(device)
        return _Queries(arguments["q_length"], known, device)
    positions = arguments.get("cache_position")
    if not isinstance(positions, Tensor) or positions.dim() != 1:
        return None
    # The queries are among the keys, so as many of them as there are keys start at the first one.
    starts_at_zero = positions.shape[0] == arguments["kv_length"] and arguments.get("kv_offset", 0) == 0
    return _Queries(positions.shape[0], 0 if starts_at_zero else None, positions.device)


def _pattern(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[..., Any],
    q_offset: int = 0,
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
