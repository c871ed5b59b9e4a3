"""Loads the two models: the original as it is stored, the other one with its int8 weights as they are.

A layer of one has its counterpart in the other under the same name.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_patch.applying import api as lifecycle
from npu_patch.checkpoints.folder import checkpoint_in
from npu_patch.checkpoints.w8a8 import SCALE, W8A8, w8a8_in
from npu_patch.commands.console.result import CommandError, named
from npu_patch.ops.w8a8.dequantised import dequantised
from npu_patch.switches import SWITCHES

KEPT = ("patch", "w8a8", "self_check")
ONLY_W8A8 = {each.name: each.name in KEPT for each in SWITCHES if (each.kind, each.of) == ("on/off", "apply()")}


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose headers were read. `w8a8`: which of its weights are int8, if any are."""

    argument: str
    folder: Path
    config: Any
    w8a8: W8A8 | None

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    def __str__(self) -> str:
        return f"{self.argument} {self.folder}"


def stored(folder: Path, argument: str) -> Stored:
    """Raises `BadCheckpoint` where something is missing, and `CommandError` for a configuration that is none."""
    from transformers import AutoConfig

    w8a8 = w8a8_in(checkpoint_in(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise CommandError(f"{argument} {folder}: its config.json cannot be used: {named(error)}") from error
    return Stored(argument, folder, config, w8a8)


def loaded(source: Stored, dtype: Any, device: torch.device) -> Any:
    """In evaluation mode.

    Raises:
        CommandError: if it cannot be loaded, or a weight is missing: it would be a random one.
    """
    auto = _class_for(source)
    try:
        with in_int8(device) if source.w8a8 else contextlib.nullcontext():
            model, said = auto.from_pretrained(source.folder, dtype=dtype, output_loading_info=True)
    except Exception as error:
        raise CommandError(f"{source} cannot be loaded: {named(error)}") from error
    missing = sorted(said["missing_keys"])
    if missing:
        raise CommandError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}: {', '.join(missing[:3])}"
        )
    if source.w8a8 and not any(is_int8(each) for each in model.modules()):
        raise CommandError(f"{source}: this transformers does not keep its int8 weights; 5.23 is known to")
    return model.eval().to(device)


def in_int8(device: torch.device, model: torch.nn.Module | None = None) -> Any:
    """A context in which int8 checkpoints are loaded as such, and the model's int8 layers computed by the device's
    operators, where it has them. All else is left unpatched."""
    return lifecycle.applied(model, device=str(device), **ONLY_W8A8)


def is_int8(module: torch.nn.Module) -> bool:
    return any(each.dtype == torch.int8 for each in module.parameters(recurse=False))


def worth(module: torch.nn.Module, name: str, dtype: torch.dtype) -> Tensor:
    """A parameter of the layer, which is multiplied by its scale if it is int8."""
    values: Tensor = getattr(module, name)
    if values.dtype != torch.int8:
        return values
    return dequantised(values, getattr(module, name + SCALE)).to(dtype)


def _class_for(source: Stored) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(source.config) in auto._model_mapping:
            return auto
    kind = source.config.model_type
    raise CommandError(f"{source}: a {kind} predicts no tokens; causal language models are accepted")
