"""A model with adapters, and one step of it: forward, backward, AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.commands.console.result import CommandError
from npu_patch.commands.subject.models import loss_of

RANK = 16


def lora_step(model: torch.nn.Module, batch: dict[str, Tensor]) -> tuple[torch.nn.Module, Callable[[], None]]:
    """The model with adapters on its linear layers, and what takes one step of it.

    Raises:
        CommandError: without peft.
    """
    adapted = with_adapters(model, r=RANK, target_modules="all-linear").train()
    device = next(adapted.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        loss_of(adapted(**batch)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return adapted, step


def with_adapters(model: torch.nn.Module, **configuration: Any) -> torch.nn.Module:
    """`configuration`: peft's, of LoRA.

    Raises:
        CommandError: without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except Exception as error:
        raise CommandError(f"a LoRA step needs peft, which cannot be imported ({error}): pip install peft") from error
    adapted: torch.nn.Module = get_peft_model(model, LoraConfig(**configuration))
    return adapted
