"""What is trained: two small random models, or the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model

from .settings import Settings, Unacceptable
from .text import VOCABULARY_OF_BYTES, Tokenize, bytes_of

# Small, in proportions that the real ones have; no special tokens, because every byte is text.
SIZES = {
    "vocab_size": VOCABULARY_OF_BYTES,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
QWEN3_5 = {
    "intermediate_size": 640,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
QWEN3_MOE = {"moe_intermediate_size": 192, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
ACCEPTED_MODEL = "accepted is a causal LM with its tokenizer, as saved by transformers"


@dataclass(frozen=True)
class Candidate:
    """A model to train, buildable as often as it is needed, with the same weights each time."""

    name: str
    title: str
    build: Callable[[], transformers.PreTrainedModel]
    tokenize: Tokenize
    vocabulary: int
    collate: Callable[[list[Any]], dict[str, torch.Tensor]] | None = None  # None: examples are tensors


def candidates(settings: Settings) -> list[Candidate]:
    """Errors: `Unacceptable`."""
    if settings.model is not None:
        return [_users_own(settings.model, settings)]
    return [
        _random(settings, "qwen3_5", "Qwen3.5", transformers.Qwen3_5TextConfig(**SIZES, **QWEN3_5)),
        _random(settings, "qwen3_moe", "Qwen3-MoE", transformers.Qwen3MoeConfig(**SIZES, **QWEN3_MOE)),
    ]


def with_lora(candidate: Candidate, settings: Settings) -> torch.nn.Module:
    """The model with fresh adapters, on the CPU: equal weights at every call."""
    transformers.set_seed(settings.seed)
    model = candidate.build()
    model.config.use_cache = False
    lora = LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=settings.lora_rank, lora_alpha=2 * settings.lora_rank
    )
    return get_peft_model(model, lora)


def _random(settings: Settings, name: str, title: str, config: transformers.PreTrainedConfig) -> Candidate:
    dtype = getattr(torch, settings.dtype)
    build = partial(transformers.AutoModelForCausalLM.from_config, config, dtype=dtype)
    return Candidate(name, f"{title}, small, random weights", build, bytes_of, VOCABULARY_OF_BYTES)


def _users_own(path: Path, settings: Settings) -> Candidate:
    build = partial(
        transformers.AutoModelForCausalLM.from_pretrained,
        path,
        dtype=getattr(torch, settings.dtype),
        local_files_only=True,
    )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, loading = build(output_loading_info=True)  # once before any training, so that it fails here or never
    except Exception as error:  # whatever transformers raises for a file that is missing or broken
        reason = shorten(str(error) or type(error).__name__, width=200)
        raise Unacceptable("--model", path, f"{reason}; {ACCEPTED_MODEL}") from None
    if loading["missing_keys"]:
        missing = shorten(", ".join(sorted(loading["missing_keys"])), width=200)
        raise Unacceptable("--model", path, f"no weights for {missing}; {ACCEPTED_MODEL}")
    config = model.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.sequence_length > longest:
        raise Unacceptable("--sequence-length", settings.sequence_length, f"the model accepts at most {longest}")

    def tokenize(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    name = path.resolve().name
    return Candidate(name, f"{name} ({type(config).__name__})", build, tokenize, config.vocab_size)
