"""Tiny vision-language models with pictures: the batches that a job may have, and what it trains."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor

from npu_patch.commands.subject.vision.batches import packed, padded
from npu_patch.commands.subject.vision.drawing import filmed, several
from npu_patch.commands.subject.vision.families import FAMILIES
from npu_patch.commands.subject.vision.models import linear_layers, tiny_vision_model
from npu_patch.commands.subject.vision.reading import Row
from tests.support.gradients import loss_and_gradients

IMAGES, PACKED, VIDEO = "images", "packed", "video"
LANGUAGE, EVERYTHING, FULL = "LoRA of the language model", "LoRA of everything", "full"
TRAINED = (LANGUAGE, EVERYTHING, FULL)


def pictures_of(family: str) -> tuple[str, ...]:
    """Those that the family takes."""
    taken = (IMAGES, PACKED if FAMILIES[family].packs else None, VIDEO if FAMILIES[family].videos else None)
    return tuple(each for each in taken if each is not None)


def made(family: str, trained: str, *, seed: int = 0, every_expert: bool = False) -> Any:
    """float32, on the CPU, evaluating. A family that the installed transformers does not have skips the test."""
    if not hasattr(transformers, FAMILIES[family].config):
        raise unittest.SkipTest(f"transformers {transformers.__version__} has no {FAMILIES[family].config}")
    model = tiny_vision_model(family, seed=seed, every_expert=every_expert)
    if trained == FULL:
        return model
    targets = linear_layers(model, FAMILIES[family], tower=trained == EVERYTHING)
    torch.manual_seed(seed + 1)
    adapters = LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    return get_peft_model(model, adapters).eval()


def rows_of(family: str, pictures: str, seed: int = 0) -> Sequence[Row]:
    """Two sequences of unlike length, with images of three sizes, or a video."""
    first, second, third = several((24, 40), (33, 17), (50, 50), seed=seed)
    if pictures != VIDEO:
        return (first, second), (third,)
    pytest.importorskip("torchvision", reason="transformers reads videos with torchvision")
    return (filmed(4, 24, 32, seed=seed),), (third,) if FAMILIES[family].mixes else ()


def batch_of(model: Any, family: str, pictures: str, *, seed: int = 0) -> dict[str, Tensor]:
    """On the CPU; for a model that is there, too."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    batch = padded(bare, FAMILIES[family], rows_of(family, pictures, seed), seed=seed)
    return packed(bare, batch) if pictures == PACKED else batch


def logits(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    found: Tensor = model(**given).logits
    return found


def results(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, loss and each gradient, as float64 on the CPU."""
    found = loss_and_gradients(model, batch)
    with torch.no_grad():
        return {"logits": logits(model, batch).cpu().double(), **found}


def label_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each token that has a label, as float64 on the CPU."""
    with torch.no_grad():
        found = logits(model, batch).cpu().double()
    losses = torch.nn.functional.cross_entropy(
        found[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    return losses[batch["labels"][:, 1:].flatten() >= 0]


@torch.no_grad()
def generated(model: Any, batch: dict[str, Tensor], count: int) -> Tensor:
    """The likeliest `count` tokens after each sequence, on the CPU. None comes twice: a random model would say the one
    word again and again."""
    device = next(model.parameters()).device
    given = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    how = {"max_new_tokens": count, "do_sample": False, "no_repeat_ngram_size": 1, "use_cache": True}
    found: Tensor = model.generate(**given, **how)
    return found[:, batch["input_ids"].shape[1] :].cpu()
