"""Tiny vision-language models: their configurations, and the processors that their images go through.

No two sizes that could be confused are equal, in the tower as in the language model; a head of a tower is no multiple
of 16, as the 72 and 80 of the real ones are no multiples of 64 and 32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PAD, IMAGE, VIDEO, START, END = 0, 96, 97, 98, 99
WORDS = (2, 90)  # the tokens of text
VOCABULARY, EXPERTS = 101, 5


@dataclass(frozen=True)
class Processor:
    """Of transformers: a class, and its arguments."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class VisionFamily:
    """`read`: which function of npu_patch/commands/subject/vision/reading.py makes features and placeholders of
    pictures. `tower`: what the names of modules begin with that are not the language model's. `mixes`: a batch may
    have images and videos. `packs`: sequences may lie behind one another, told by position_ids."""

    config: str
    arguments: Mapping[str, Any]
    read: str
    images: Processor
    videos: Processor | None = None
    tower: tuple[str, ...] = ("model.visual",)
    mixes: bool = True
    packs: bool = True
    reading: Mapping[str, Any] = field(default_factory=dict)  # further arguments of `read`


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
    "use_cache": False,  # as trainers have it: beside a cache, no packing is looked for
}
MIXTURE: dict[str, Any] = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GATED_DELTA: dict[str, Any] = {
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
TOWER: dict[str, Any] = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN2_TOWER = {**TOWER, "embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2}
QWEN2_5_TOWER = {
    **TOWER,
    "hidden_size": 48,
    "intermediate_size": 88,
    "out_hidden_size": 64,
    "window_size": 16,  # of two merged patches
    "fullatt_block_indexes": [1],
}
QWEN3_TOWER = {
    **TOWER,
    "hidden_size": 48,
    "intermediate_size": 88,
    "out_hidden_size": 64,
    "num_position_embeddings": 25,
}
QWEN_TOKENS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}
SECTIONS = {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
INTERLEAVED = {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}}
GRIDS: dict[str, Any] = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
GRID_SIZE = {"size": {"shortest_edge": 64, "longest_edge": 8192}}
CLIP = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
SIGLIP_TOWER = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 6,
}


def _qwen(config: str, tower: Mapping[str, Any], text: Mapping[str, Any], videos: str, **others: Any) -> VisionFamily:
    apart = videos == "Qwen3VLVideoProcessor"
    return VisionFamily(
        config,
        {"vision_config": tower, "text_config": {**TEXT, **text}, **QWEN_TOKENS},
        "grids",
        Processor("Qwen2VLImageProcessor", {**GRIDS, **GRID_SIZE, **CLIP}),
        Processor(videos, {**GRIDS, **GRID_SIZE, **CLIP, "do_sample_frames": False, "cap_pixels_per_frame": False}),
        reading={"frames_apart": apart},
        **others,
    )


_DEEPSTACK = {**QWEN3_TOWER, "deepstack_visual_indexes": [0, 1]}
_QWEN3_TEXT = {**INTERLEAVED, "head_dim": 16, "num_attention_heads": 6}
_SHARED = {"shared_expert_intermediate_size": 56}

FAMILIES: dict[str, VisionFamily] = {
    "qwen2_vl": _qwen("Qwen2VLConfig", QWEN2_TOWER, SECTIONS, "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": _qwen("Qwen2_5_VLConfig", QWEN2_5_TOWER, SECTIONS, "Qwen2VLVideoProcessor"),
    "qwen3_vl": _qwen("Qwen3VLConfig", _DEEPSTACK, _QWEN3_TEXT, "Qwen3VLVideoProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3VLMoeConfig", _DEEPSTACK, {**_QWEN3_TEXT, **MIXTURE}, "Qwen3VLVideoProcessor"),
    # Nothing tells their linear attention where one packed sequence ends.
    "qwen3_5": _qwen("Qwen3_5Config", QWEN3_TOWER, GATED_DELTA, "Qwen3VLVideoProcessor", packs=False),
    "qwen3_5_moe": _qwen(
        "Qwen3_5MoeConfig", QWEN3_TOWER, {**GATED_DELTA, **MIXTURE, **_SHARED}, "Qwen3VLVideoProcessor", packs=False
    ),
    "internvl": VisionFamily(
        "InternVLConfig",
        {
            "vision_config": {**SIGLIP_TOWER, "layer_scale_init_value": 0.7},
            "text_config": {**TEXT, "model_type": "qwen2"},
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "downsample_ratio": 0.5,
            "tie_word_embeddings": False,
        },
        "tiles",
        Processor(
            "GotOcr2ImageProcessor",
            {**CLIP, "size": {"height": 24, "width": 24}, "crop_to_patches": True, "min_patches": 1, "max_patches": 3},
        ),
        Processor("InternVLVideoProcessor", {**CLIP, "size": {"height": 24, "width": 24}}),
        tower=("model.vision_tower", "model.multi_modal_projector"),
        reading={"tokens": 4},
    ),
    "gemma3": VisionFamily(
        "Gemma3Config",
        {
            "vision_config": {**SIGLIP_TOWER, "model_type": "siglip_vision_model", "vision_use_head": False},
            "text_config": {
                **TEXT,
                "head_dim": 32,
                "query_pre_attn_scalar": 32,
                "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "mm_tokens_per_image": 4,
            "boi_token_index": START,
            "eoi_token_index": END,
            "image_token_index": IMAGE,
            "tie_word_embeddings": False,
        },
        "pooled",
        Processor("Gemma3ImageProcessor", {**CLIP, "size": {"height": 24, "width": 24}}),
        tower=("model.vision_tower", "model.multi_modal_projector"),
        packs=False,  # transformers 5.23 takes images of other sequences for those of a packed one in sliding layers
        reading={"tokens": 4},
    ),
    "smolvlm": VisionFamily(
        "SmolVLMConfig",
        {
            "vision_config": SIGLIP_TOWER,
            "text_config": {**TEXT, "model_type": "llama"},
            "image_token_id": IMAGE,
            "scale_factor": 2,
            "pad_token_id": PAD,
            "use_cache": False,
            "tie_word_embeddings": False,
        },
        "split",
        Processor(
            "SmolVLMImageProcessor",
            {**CLIP, "size": {"longest_edge": 48}, "max_image_size": {"longest_edge": 24}, "do_image_splitting": True},
        ),
        Processor(
            "SmolVLMVideoProcessor",
            {**CLIP, "size": {"longest_edge": 24}, "max_image_size": {"longest_edge": 24}, "do_sample_frames": False},
        ),
        tower=("model.vision_model", "model.connector"),
        mixes=False,
        reading={"tokens": 4},
    ),
}
