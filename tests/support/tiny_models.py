"""Tiny causal language models of ten families, with awkward sizes.

No two sizes that could be confused are equal: head_dim is not hidden_size / heads, intermediate sizes are not twice the
hidden size, experts are not square, sequence lengths are the caller's. All weights are random, norm weights included,
so that `1 + weight` cannot pass for `weight`.
"""

import types
import unittest
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Family:
    """How to build one family: its config class, and what differs from COMMON."""

    config: str
    arguments: dict[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "use_cache": True,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "norm_topk_prob": True,
}
GATED_DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}

_FAMILIES: dict[str, Family] = {
    "qwen2": Family("Qwen2Config"),
    "qwen3": Family("Qwen3Config"),
    "qwen3_moe": Family("Qwen3MoeConfig", EXPERTS),
    "qwen3_next": Family("Qwen3NextConfig", {**EXPERTS, **GATED_DELTA, "shared_expert_intermediate_size": 56}),
    "qwen3_5": Family("Qwen3_5TextConfig", GATED_DELTA),
    "qwen3_5_moe": Family("Qwen3_5MoeTextConfig", {**EXPERTS, **GATED_DELTA, "shared_expert_intermediate_size": 56}),
    "llama": Family("LlamaConfig"),
    "mistral": Family("MistralConfig", {"sliding_window": 9}),
    "gemma3": Family(
        "Gemma3TextConfig",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ),
    "glm4_moe": Family(
        "Glm4MoeConfig",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "use_qk_norm": True,
            "partial_rotary_factor": 0.5,
        },
    ),
}

# With other routers and gates than those; for what is special to experts.
_MIXTURES: dict[str, Family] = {
    "mixtral": Family("MixtralConfig", {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 40}),
    "gpt_oss": Family(
        "GptOssConfig",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "intermediate_size": 40,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek_v3": Family(
        "DeepseekV3Config",
        {
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "num_key_value_heads": 6,
            "head_dim": 8,
            "q_lora_rank": 20,
            "kv_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 12,
            "v_head_dim": 20,
        },
    ),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)
MIXTURES: tuple[str, ...] = tuple(_MIXTURES)


def tiny(name: str, *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A float32 model on the CPU, in evaluation mode, of a family in `FAMILIES` or `MIXTURES`; `overrides` are config
    arguments.

    A family that the installed transformers does not have skips the test."""
    import transformers

    family = (_FAMILIES | _MIXTURES)[name]
    if not hasattr(transformers, family.config):
        raise unittest.SkipTest(f"transformers {transformers.__version__} has no {family.config}")  # pytest skips too
    config = getattr(transformers, family.config)(**{**COMMON, **family.arguments, **overrides})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1:
                parameter.mul_(2.0)  # transformers' initial weights are small enough to hide a wrong attention
    return model


def tiny_batch(*, batch: int = 2, length: int = 13, vocabulary: int = 101, seed: int = 1) -> dict[str, torch.Tensor]:
    """input_ids and labels [batch, length] on the CPU; the first tokens of row 0 have no label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    return {"input_ids": ids, "labels": labels}


def with_forwards_of_their_own(model: torch.nn.Module) -> torch.nn.Module:
    """Its feed-forward layers as another patcher leaves them: nothing of theirs may be replaced."""
    for layer in model.model.layers:
        layer.mlp.forward = types.MethodType(_of_another_patcher, layer.mlp)
    return model


def _of_another_patcher(self: Any, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return result
