"""A small random model of any model type, so that it can be run anywhere within a second.

Sizes that could be confused differ: head_dim is not hidden_size / heads, no experts' side is twice another.
"""

from __future__ import annotations

from typing import Any

import torch

from npu_patch.commands.console.result import CommandError, named

# By the names under which configurations keep them. Only those that a configuration has are set.
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "sliding_window": 9,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
    "bos_token_id": 1,
    "eos_token_id": 2,  # a text model may be pooled where it stands
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
TOKENS = ("eos_token_id", "pad_token_id", "bos_token_id")
NUMBERS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
EXPERTS, CHOSEN = 6, 2


def tiny_model(model_type: str, *, seed: int = 0, every_expert: bool = False) -> torch.nn.Module:
    """A float32 causal language model (or, where the type has none, its bare model) on the CPU, in evaluation mode.

    Random norm weights too, so that `1 + weight` cannot pass for `weight`. `every_expert`: each token goes to all
    experts; which ones it goes to is otherwise a step function of roundings.

    Raises:
        CommandError: if no such model can be built.
    """
    try:
        config = tiny_config(model_type, every_expert)
        auto = auto_class(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = auto.from_config(config).float().eval()
            shaken(model)
    except Exception as error:
        raise CommandError(
            f"no tiny {model_type} can be built ({named(error)}); give the folder of a model instead"
        ) from error
    return model


def few_layers(model_type: str, *, seed: int = 0) -> torch.nn.Module:
    """A random model with the sizes of the type's default configuration and one layer of each kind (two, if they are
    all alike); bfloat16, on the CPU, in evaluation mode.

    Raises:
        CommandError: if no such model can be built.
    """
    try:
        return random_model(few_layers_config(model_type), seed)
    except Exception as error:
        raise CommandError(f"no {model_type} can be built ({named(error)})") from error


def few_layers_config(model_type: str) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type).get_text_config()
    kinds = _kinds(config)
    if kinds:
        config.layer_types = kinds
    config.num_hidden_layers = len(kinds) or 2
    if config.is_encoder_decoder and config.decoder_start_token_id is None:
        config.decoder_start_token_id = SIZES["decoder_start_token_id"]
    return config


def random_model(config: Any, seed: int) -> torch.nn.Module:
    """Of bfloat16, on the CPU, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto_class(config).from_config(config, dtype=torch.bfloat16).eval()


def auto_class(config: Any) -> Any:
    """With a head for language, where the type has one: it takes labels and gives a loss."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    order = (AutoModelForCausalLM, AutoModelForSeq2SeqLM)
    return next((auto for auto in order if type(config) in auto._model_mapping), AutoModel)


def _kinds(config: Any) -> list[str]:
    """Of its layers, where it can be told to have these; two, if they are all alike."""
    if isinstance(getattr(type(config), "layer_types", None), property):
        return []
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
    return kinds * 2 if len(kinds) == 1 else kinds


def tiny_config(model_type: str, every_expert: bool = False) -> Any:
    """The type's configuration (of its language model, where it has several) at the sizes above, with one layer of
    each kind."""
    from transformers import AutoConfig

    default = AutoConfig.for_model(model_type).get_text_config()
    wanted = SIZES | {name: EXPERTS for name in NUMBERS_OF_EXPERTS}
    wanted["num_experts_per_tok"] = EXPERTS if every_expert else CHOSEN
    given = {name: value for name, value in wanted.items() if getattr(default, name, None) is not None}
    given |= {name: wanted[name] for name in TOKENS if hasattr(default, name)}
    if getattr(default, "is_encoder_decoder", False):  # decoder inputs are made of labels, which some need this for
        given["decoder_start_token_id"] = wanted["decoder_start_token_id"]
    if "qk_rope_head_dim" in given and "head_dim" in given:  # multi-head latent attention: its rotary part
        given["head_dim"] = given["qk_rope_head_dim"]
    kinds = _kinds(default)
    if kinds:
        given |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    return type(default)(**given)


def shaken(model: torch.nn.Module) -> None:
    """transformers' initial weights are ones, and small enough to hide a wrong attention."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif parameter.dim() > 1:
                parameter.mul_(2.0)
