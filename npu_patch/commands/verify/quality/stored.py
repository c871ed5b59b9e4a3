"""Loads the two models: the original as it is stored, the other one with its int8 weights as they are worth.

Both are modules of one class, so that a layer of one has its counterpart in the other under the same name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_patch.checkpoints.folder import Checkpoint, checkpoint_in
from npu_patch.checkpoints.w8a8 import OFFSET, SCALE, W8A8, w8a8_in
from npu_patch.commands.console.result import CommandError, named
from npu_patch.commands.verify.quality.int8_inputs import Int8Inputs

NOT_LOADED = ("mtp.",)  # layers that transformers leaves in the checkpoint


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose headers were read. `w8a8`: which of its weights are int8, if any are."""

    argument: str
    checkpoint: Checkpoint
    config: Any
    w8a8: W8A8 | None

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config()

    def __str__(self) -> str:
        return f"{self.argument} {self.checkpoint.folder}"


def stored(folder: Path, argument: str) -> Stored:
    """Raises `BadCheckpoint` where something is missing, and `CommandError` for a configuration that is none."""
    from transformers import AutoConfig

    checkpoint = checkpoint_in(folder)
    found = w8a8_in(checkpoint)
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise CommandError(f"{argument} {folder}: its config.json cannot be used: {named(error)}") from error
    for each in (config, config.get_text_config()):
        if found is not None and hasattr(each, "quantization_config"):
            del each.quantization_config  # its weights are dequantised here
    return Stored(argument, checkpoint, config, found)


@dataclass(frozen=True)
class Loaded:
    """`int8`: names of the modules whose weights are int8 on disk; `inputs`: the context in which they compute so."""

    model: torch.nn.Module
    int8: frozenset[str]
    inputs: Int8Inputs

    def not_as_int8(self) -> list[str]:
        """Those that did not compute so: with something else than `functional.linear`."""
        return sorted(each for each in self.int8 if not self.inputs.has_met(_matrices(self.model.get_submodule(each))))


def loaded(source: Stored, dtype: Any, device: torch.device) -> Loaded:
    """In evaluation mode.

    Raises:
        CommandError: if it cannot be loaded, or a weight is missing: it would be a random one.
    """
    kind, config = _class_of(source)
    options: dict[str, Any] = {"config": config, "dtype": dtype, "output_loading_info": True}
    try:
        if source.w8a8 is None:
            model, said = kind.from_pretrained(source.checkpoint.folder, **options)
        else:
            weights = dict(dequantised(source.checkpoint, source.w8a8))
            model, said = kind.from_pretrained(None, state_dict=weights, **options)
            if getattr(model, "_can_set_experts_implementation", bool)():
                model.set_experts_implementation("eager")  # of linear products, which `Int8Inputs` meets
    except Exception as error:
        raise CommandError(f"{source} cannot be loaded: {named(error)}") from error
    missing = sorted(said["missing_keys"])
    if missing:
        raise CommandError(f"{source} lacks {len(missing)} weights of a {kind.__name__}: {', '.join(missing[:3])}")
    model = model.eval().to(device)
    int8 = _int8_modules(source, source.w8a8, model) if source.w8a8 else frozenset()
    return Loaded(model, int8, Int8Inputs(each for name in int8 for each in _matrices(model.get_submodule(name))))


def dequantised(checkpoint: Checkpoint, w8a8: W8A8) -> Iterator[tuple[str, Tensor]]:
    """Weight times scale in the scale's dtype; all else as it is."""
    from safetensors import safe_open

    beside = {name + ending for name in w8a8.weights for ending in (SCALE, OFFSET)}
    files = {name: safe_open(checkpoint.folder / name, "pt") for name in checkpoint.shards}
    where = {entry.name: files[name] for name, header in checkpoint.shards.items() for entry in header.entries}
    for name, file in where.items():
        if name in beside:
            continue
        tensor = file.get_tensor(name)
        if name in w8a8.weights:
            scale = where[name + SCALE].get_tensor(name + SCALE)
            scale = scale[:, None] if scale.dim() < tensor.dim() else scale
            tensor = (tensor.float() * scale.float()).to(scale.dtype)
        yield name, tensor


def _class_of(source: Stored) -> tuple[Any, Any]:
    """The model's class, and the configuration that it takes: of several, the language model's."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    config = source.config
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            kind = auto._model_mapping[type(config)]
            of_text = kind.config_class is not type(config) and kind.config_class is type(source.text_config)
            return kind, source.text_config if of_text else config
    raise CommandError(f"{source}: a {config.model_type} predicts no tokens; causal language models are accepted")


def _matrices(module: torch.nn.Module) -> list[Tensor]:
    return [each for each in module.parameters(recurse=False) if each.dim() > 1]


def _int8_modules(source: Stored, w8a8: W8A8, model: torch.nn.Module) -> frozenset[str]:
    """Checkpoints have experts apart that models pack, and other names before those of the layers."""
    found = {_place(name): name for name, module in model.named_modules() if _matrices(module)}
    wanted = {_place(name): name for name in w8a8.weights if not name.startswith(NOT_LOADED)}
    lost = [name for place, name in wanted.items() if place not in found]
    if lost:
        raise CommandError(f"{source}: {lost[0]} is int8, and no layer of a {type(model).__name__}")
    return frozenset(found[place] for place in wanted)


def _place(name: str) -> str:
    """Of a module, or of the weight of one, within the model's layers."""
    module = re.sub(r"\.experts\.(\d+\.)?\w+_proj$", ".experts", name.removesuffix(".weight"))
    return re.sub(r"^.*?layers\.", "", module)
