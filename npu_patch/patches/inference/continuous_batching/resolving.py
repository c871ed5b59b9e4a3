"""Which of transformers' ways a manager takes on the NPU: flash attention, pages, graphs, and a cache of what size."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from npu_patch import log
from npu_patch.ops.attention.fusion import WITH_SINK
from npu_patch.ops.attention.paged import DTYPES, MOST_ELEMENTS, why_no_cache, why_no_pages
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved
from npu_patch.waiting.as_flash import FLASH

SOFTCAPS = ("attn_logit_softcapping", "attn_logits_soft_cap", "attention_softcap")


def serve_switch(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """transformers looks for packages of flash attention, which this device does without."""

    def switch_to_cb_friendly_attn(self: Any, model: Any, auto_switch_to_flash: bool = True) -> Any:
        before = model.config._attn_implementation
        reason = why_not_flash(model, before, device_type) if auto_switch_to_flash else "auto_switch_to_flash is False"
        if reason is not None:
            return Unserved(reason)
        model.set_attn_implementation(FLASH)
        self._original_attn_impl = before
        return None

    return switch_to_cb_friendly_attn


def why_not_flash(model: Any, attention: str, device_type: str) -> str | None:
    if attention not in ("sdpa", "eager"):
        return f"the attention is {attention} already"
    if model.device.type != device_type:
        return f"a model on {model.device.type}"
    if not model._supports_flash_attn or getattr(model, "_compatible_flash_implementations", None):
        return "the model does not support this flash attention"
    if model.dtype not in DTYPES:
        return f"a model in {str(model.dtype).removeprefix('torch.')}: paged attention takes float16 and bfloat16"
    config = model.config.get_text_config()
    if any(getattr(config, name, None) is not None for name in SOFTCAPS):
        return "softcap, which flash attention on this device does not know"
    sinks = any(isinstance(getattr(each, "sinks", None), torch.Tensor) for each in model.modules())
    lacking = WITH_SINK.missing() if sinks else None
    return None if lacking is None else f"attention sinks: {lacking}"


def serve_fast_path(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """Whether steps of single tokens take tables of pages. What the cache says of it is asked once there is one."""

    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, user_requested: bool) -> Any:
        reason = _why_no_table(config) or why_no_pages(cb_config.page_size) or _why_compiled(config, cb_config)
        return None if reason is None else Unserved(reason)

    return ensure_decode_fast_path_is_available


def _why_no_table(config: Any) -> str | None:
    from transformers.generation.continuous_batching.cache import ATTN_TYPE_TO_ALLOCATOR, group_layers_by_attn_type

    if config._attn_implementation != FLASH:
        return f"the attention is {config._attn_implementation}, which has no tables of pages"
    lacking = [
        kind for kind in group_layers_by_attn_type(config) if not ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table
    ]
    return f"{lacking[0]} has no tables of pages" if lacking else None


def _why_compiled(config: Any, cb_config: Any) -> str | None:
    compiled = cb_config.default_compile_level > 0 or cb_config.decode_compile_config is not None
    return "steps are compiled" if compiled or getattr(config, "compile_config", None) is not None else None


def serve_graphs(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """Packed sequences come to flash attention with their lengths on the host, which a graph would keep for ever."""

    def decide_use_cuda_graphs(cb_config: Any, is_attn_mask_needed: bool, cuda_graph_requested: bool) -> None:
        original(
            cb_config=cb_config, is_attn_mask_needed=is_attn_mask_needed, cuda_graph_requested=cuda_graph_requested
        )
        packed, single = cb_config.cuda_graph_booleans
        if not is_attn_mask_needed:
            cb_config.use_cuda_graph = (False, single and cb_config.max_blocks_per_request > 0)
            if packed:
                calls.fell_through["flash attention over packed sequences is not captured"] += 1

    return decide_use_cuda_graphs


def serve_cache(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """A cache is made no larger than what the operator for pages takes, unless somebody says how large it is to be;
    then, or where it refuses it for another reason, single tokens take the way of all others."""

    def init(self: Any, config: Any, continuous_batching_config: Any, device: Any, *args: Any, **kwargs: Any) -> None:
        asked = continuous_batching_config
        original(self, config, asked, device, *args, **kwargs)
        if self.max_blocks_per_request <= 0:
            return
        most = _most_blocks(self)
        if asked.num_blocks is None and self.num_blocks > most >= asked.max_blocks_per_request:
            log.info(f"generate_batch: a cache of {most} blocks, not {self.num_blocks}: paged attention takes no more")
            asked.num_blocks, self.cache_tensor = most, None
            original(self, config, asked, device, *args, **kwargs)
            asked.num_blocks = None
        reason = _why_no_paged(self, config, asked, device_type)
        if reason is not None:
            calls.fell_through[reason] += 1
            self.max_blocks_per_request = self.max_decode_fast_path_length = asked.max_blocks_per_request = 0
            asked.use_cuda_graph = (asked.cuda_graph_booleans[0], False)

    return init


def _page_views(cache: Any) -> Iterable[torch.Tensor]:
    for layer, allocator in cache.layer_to_allocator.items():
        yield allocator.get_cache_for_block_table(layer)[0]


def _most_blocks(cache: Any) -> int:
    """How many blocks a cache may have whose pages the operator takes, beside those in which padding is written."""
    sectors = MOST_ELEMENTS // (cache.bytes_per_sector // cache.dtype.itemsize) - 2
    (allocator,) = cache.cache_allocators.values()  # others than full attention have no tables of pages
    return int(max(0, sectors) * cache.bytes_per_sector // allocator.bytes_per_block)


def _why_no_paged(cache: Any, config: Any, asked: Any, device_type: str) -> str | None:
    if torch.device(cache.device).type != device_type:
        return f"a cache on {torch.device(cache.device).type}"
    shared = config.num_attention_heads // cache_heads(config)
    for pages in _page_views(cache):
        reason = why_no_cache(pages, shared * pages.shape[2])
        if reason is not None:
            return reason
        most = asked.max_requests_per_batch * asked.max_blocks_per_request
        if cache.use_prefix_sharing and most > len(pages):  # else no page is counted twice
            return f"a small cache: {most} pages may be shared in one step, and the operator counts up to {len(pages)}"
    return None


def cache_heads(config: Any) -> int:
    heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads


def serve_memory(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """transformers asks CUDA, XPU and MPS, and takes the host's memory for that of any other device."""

    def get_device_and_memory_breakdown() -> tuple[torch.device, int, int, int]:
        module = torch.get_device_module(device_type)
        module.empty_cache()
        module.synchronize()
        free, total = module.mem_get_info()
        return torch.device(device_type), total, module.memory_reserved(), total - free

    return get_device_and_memory_breakdown
