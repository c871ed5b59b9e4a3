"""Models and layers with LoRA adapters, and what one training step of them computes."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import Tensor

import npu_patch
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch


@dataclass(frozen=True)
class Precision:
    """The dtypes of a model and of its adapters, and whether it runs under autocast to bfloat16."""

    model: torch.dtype
    adapters: torch.dtype
    autocast: bool = False

    def around(self, device: torch.device | str) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=self.autocast)


PRECISIONS = {
    "float32": Precision(torch.float32, torch.float32),
    "float32, autocast": Precision(torch.float32, torch.float32, True),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "bfloat16, float32 adapters": Precision(torch.bfloat16, torch.float32),
    "bfloat16, float32 adapters, autocast": Precision(torch.bfloat16, torch.float32, True),
}
HALF = tuple(name for name in PRECISIONS if name != "float32")


def in_precision(module: torch.nn.Module, precision: Precision) -> Any:
    module = module.to(precision.model)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(precision.adapters)
            parameter.requires_grad_(True)
    return module


def adapted_model(
    family: str, dropout: float = 0.0, precision: Precision = PRECISIONS["float32"], seed: int = 0, **overrides: Any
) -> Any:
    """On the CPU, training; a scaling that is no power of two."""
    model = tiny(family, seed=seed, **overrides)
    torch.manual_seed(seed + 1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if "moe" in family else "all-linear"
    config = LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    return in_precision(get_peft_model(model, config), precision).train()


def adapted_layer(
    dropout: float = 0.0, precision: Precision = PRECISIONS["float32"], bias: bool = True, seed: int = 0, **config: Any
) -> AdaptedLinear:
    """Of 48 to 72 features, on the CPU, training."""
    torch.manual_seed(seed)
    base = torch.nn.Linear(48, 72, bias=bias).requires_grad_(False)
    wanted = LoraConfig(r=4, lora_alpha=3, lora_dropout=dropout, **{"init_lora_weights": False, **config})
    return in_precision(AdaptedLinear(base, "default", wanted, r=4, lora_alpha=3), precision).train()


def a_step(model: torch.nn.Module, precision: Precision = PRECISIONS["float32"], seed: int = 3) -> dict[str, Tensor]:
    """Loss and gradients under the same random numbers."""
    torch.manual_seed(seed)
    with precision.around(next(model.parameters()).device):
        return loss_and_gradients(model, tiny_batch(seed=seed))


def fell_through(report: npu_patch.Report) -> dict[str, int]:
    """By reason."""
    found: dict[str, int] = {}
    for outcome in report:
        if outcome.patch == "lora":
            found.update(outcome.calls.fell_through)
    return found


def ran(report: npu_patch.Report) -> int:
    return sum(outcome.calls.ran for outcome in report if outcome.patch == "lora")
