"""Tiny models, quantised on disk by the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from npu_patch.commands import main
from npu_patch.commands.subject.tiny_model import tiny_model

DENSE = ["qwen3", "qwen3_5_text"]
WITH_EXPERTS = ["qwen3_moe", "qwen3_5_moe_text", "qwen3_next"]
IDS = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def quantised(model_type: str, folder: Path, *options: str, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Of tokens that go to all experts: which ones they go to is otherwise a step function of roundings."""
    saved(tiny_model(model_type, every_expert=True).to(dtype), folder / "original")
    assert main(["quantize", str(folder / "original"), str(folder / "int8"), *options]) == 0
    return folder / "int8"


def loaded(folder: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **({"dtype": "auto"} | options))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS.to(model.device)).logits.double().cpu()


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())
