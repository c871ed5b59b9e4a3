"""Tiny models on disk with a head of several tokens beside them, in the published naming."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_patch.checkpoints.beside import write_beside
from npu_patch.patches.inference.mtp import training
from npu_patch.patches.inference.mtp.head import new_head, published_names
from tests.support.tiny_models import tiny

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
COUNTED = 97
GREEDY = {"do_sample": False, "pad_token_id": 0}


def saved(family: str, folder: Path, *, max_shard_size: str = "1GB", **overrides: Any) -> Path:
    """A model with random weights, and a head of random weights."""
    model = tiny(family, max_position_embeddings=512, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    torch.manual_seed(5)
    write_beside(folder, published_names(new_head(model)), "mtp.safetensors")
    return folder


def loaded(folder: Path, **given: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()


def prompt(tokens: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(2, 100, (1, tokens), generator=torch.Generator().manual_seed(seed))


def counting(samples: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A task: numbers that go up by the same step, modulo COUNTED."""
    first = torch.randint(0, COUNTED, (samples, 1), generator=generator)
    step = torch.randint(1, 6, (samples, 1), generator=generator)
    return (first + step * torch.arange(tokens)) % COUNTED + 2


def trained(family: str, folder: Path, steps: int = 70) -> Path:
    """A model that has learned to count, and its head."""
    generator = torch.Generator().manual_seed(1)
    model = tiny(family, max_position_embeddings=512).train()
    _fit(model.parameters(), steps, lambda ids: model(input_ids=ids, labels=ids).loss, generator)
    model.eval().requires_grad_(False)
    torch.manual_seed(5)
    head = new_head(model)
    states_of = training.states_of
    _fit(head.parameters(), steps, lambda ids: training.loss(head, model, states_of(model, ids), ids), generator)
    model.save_pretrained(folder)
    write_beside(folder, published_names(head), "mtp.safetensors")
    return folder


def _fit(parameters: Any, steps: int, loss_of: Any, generator: torch.Generator) -> None:
    optimizer = torch.optim.AdamW(parameters, 5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(counting(16, 24, generator)).backward()
        optimizer.step()
