"""npu_scatter_pa_kv_cache: new keys and values into the blocks of a paged cache.

Source: torch_npu's operator documentation. Not simulated, and refused: the NZ layout, which is the operator's default
(cache_mode "PA_NZ"), and compression.
"""

import torch
from torch import Tensor

from ..refusal import require, require_contiguous, require_dtype, require_same_dtype, values_count
from .kernel import Kernel


def npu_scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Writes token t of key [T, N, D] and value [T, N, Dv] to slot_mapping[t] = block * block_size + row of the caches
    [blocks, block_size, N, D] and [blocks, block_size, N, Dv]."""
    name = "npu_scatter_pa_kv_cache"
    require(cache_mode in (None, "Norm"), name, f"cache_mode={cache_mode!r} is not simulated, only 'Norm' (ND) is")
    for argument, tensor in (
        ("compress_lens", compress_lens), ("compress_seq_offsets", compress_seq_offsets), ("seq_lens", seq_lens),
    ):  # fmt: skip
        require(tensor is None, name, f"{argument} is not simulated")
    require_same_dtype(name, key=key, value=value, key_cache=key_cache, value_cache=value_cache)
    require_dtype(name, "slot_mapping", slot_mapping, (torch.int32, torch.int64))
    for argument, tensor in (
        ("key", key), ("value", value), ("key_cache", key_cache), ("value_cache", value_cache),
        ("slot_mapping", slot_mapping),
    ):  # fmt: skip
        require_contiguous(name, argument, tensor)
    require(
        key.dim() == value.dim() == 3 and key.shape[:2] == value.shape[:2],
        name,
        f"key and value must be [T, N, D], alike but for D, not {list(key.shape)} and {list(value.shape)}",
    )
    for argument, cache, new in (("key_cache", key_cache, key), ("value_cache", value_cache, value)):
        require(
            cache.dim() == 4 and cache.shape[2:] == new.shape[1:] and cache.shape[:2] == key_cache.shape[:2],
            name,
            f"{argument} must be [blocks, block_size, {new.shape[1]}, {new.shape[2]}], not {list(cache.shape)}",
        )
    require(
        tuple(slot_mapping.shape) == (key.shape[0],),
        name,
        f"slot_mapping must be [{key.shape[0]}], a slot for each token, not {list(slot_mapping.shape)}",
    )
    if not values_count():
        return
    slots, most = slot_mapping.long(), key_cache.shape[0] * key_cache.shape[1]
    require(
        bool(((slots >= 0) & (slots < most)).all()),
        name,
        f"slot_mapping must be from 0 to {most - 1}, not {slots.tolist()}",
    )
    require(
        slots.unique().numel() == slots.numel(), name, f"the slots of slot_mapping must differ, not {slots.tolist()}"
    )
    key_cache.flatten(0, 1)[slots] = key
    value_cache.flatten(0, 1)[slots] = value


KERNELS = {
    "npu_scatter_pa_kv_cache": Kernel(npu_scatter_pa_kv_cache),
}
