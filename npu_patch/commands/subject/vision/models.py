"""Random vision-language models of the families, and which of their parts is which."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from npu_patch.commands.console.result import CommandError
from npu_patch.commands.subject.tiny_model import shaken
from npu_patch.commands.subject.vision.families import EXPERTS, FAMILIES, VisionFamily


def tiny_vision_model(name: str, *, seed: int = 0, every_expert: bool = False) -> torch.nn.Module:
    """float32, on the CPU, in evaluation mode.

    Raises:
        CommandError: for a family that is none, or that the installed transformers does not have.
    """
    from transformers import AutoModelForImageTextToText

    family = vision_family(name)
    config = vision_config(family, {"num_experts_per_tok": EXPERTS} if every_expert and "moe" in name else {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: torch.nn.Module = AutoModelForImageTextToText.from_config(config).float().eval()
        shaken(model)
        _filled(model)
    return model


@torch.no_grad()
def _filled(model: torch.nn.Module) -> None:
    """transformers leaves biases, tokens of their own and even a projection at zero, behind which no tower is seen."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.normal_(std=0.1)


def vision_family(name: str) -> VisionFamily:
    if name not in FAMILIES:
        raise CommandError(f"{name!r} is no family with pictures: accepted are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def vision_config(family: VisionFamily, text: Mapping[str, Any]) -> Any:
    """`text`: further sizes of the language model."""
    import transformers

    kind = getattr(transformers, family.config, None)
    if kind is None:
        raise CommandError(f"transformers {transformers.__version__} has no {family.config}")
    return kind(**{**family.arguments, "text_config": {**family.arguments["text_config"], **text}})


def linear_layers(model: torch.nn.Module, family: VisionFamily, *, tower: bool) -> list[str]:
    """Names of the linear layers that adapters may stand at: the language model's, and with `tower` all but the
    head."""
    return [
        name
        for name, each in model.named_modules()
        if type(each) is torch.nn.Linear
        and not name.endswith("lm_head")
        and (tower or not name.startswith(family.tower))
    ]
