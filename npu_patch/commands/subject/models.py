"""MODEL on the command line: a model type, of which a small random model is made, or the name or folder of a model."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npu_patch import devices
from npu_patch.commands.console import arguments
from npu_patch.commands.console.result import CommandError, named
from npu_patch.commands.subject.families import model_types, unknown
from npu_patch.commands.subject.tiny_model import (
    auto_class,
    few_layers,
    few_layers_config,
    random_model,
    tiny_config,
    tiny_model,
)

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in arguments.DTYPES}
WEIGHTS = (".safetensors", ".bin")  # endings of files


@dataclass(frozen=True)
class Source:
    """`make(seed, every_expert)` gives the model, float32 or as it is stored, on the CPU."""

    described: str
    make: Callable[[int, bool], torch.nn.Module]
    tiny: bool


def device_of(options: argparse.Namespace) -> torch.device:
    """Raises `CommandError` for a device that is none here."""
    name, colon, index = options.device.partition(":")
    if name not in devices.TYPES or (colon and not index.isdecimal()):
        raise CommandError(
            f"--device {options.device}: accepted are {', '.join(devices.TYPES)}, and npu:0 and the like"
        )
    reason = devices.why_none(name)
    if reason is not None:
        raise CommandError(f"--device {options.device}: {reason}")
    count = 1 if name == "cpu" else getattr(torch, name).device_count()
    if colon and int(index) >= count:
        raise CommandError(f"--device {options.device}: {f'there are {count}' if count > 1 else 'there is 1'} {name}")
    return torch.device(name if name == "cpu" else options.device)


def source_of(model: str) -> Source:
    """Raises `CommandError` for a MODEL that is neither a model type nor a model, with the near names."""
    known = model_types()
    if is_stored(model, known):
        return Source(model, lambda seed, every_expert: _stored(model), tiny=False)
    if model not in known:
        raise CommandError(unknown(model, known))
    return Source(
        f"a tiny random {model}", lambda seed, every: tiny_model(model, seed=seed, every_expert=every), tiny=True
    )


def is_stored(model: str, known: Collection[str]) -> bool:
    """Whether MODEL is a folder or a name on the hub. A folder of another kind does not hide a model type.

    Raises:
        CommandError: for a folder that is none, or that has no model.
    """
    folder = Path(model)
    if (folder / "config.json").is_file():
        return True
    if model in known:
        return False
    if folder.is_dir():
        raise CommandError(f"MODEL {model}: the folder has no config.json")
    if model.startswith(("/", "./", "../", "~")):
        raise CommandError(f"MODEL {model}: there is no such folder")
    return "/" in model


def stored_configuration(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:
        raise _unloadable(model, error) from error


def _stored(name: str) -> torch.nn.Module:
    config = stored_configuration(name)
    try:
        return auto_class(config).from_pretrained(name, dtype="auto").eval()
    except Exception as error:
        raise _unloadable(name, error) from error


def _unloadable(name: str, error: Exception) -> CommandError:
    return CommandError(f"MODEL {name} cannot be loaded: {named(error)}")


def batch_for(model: torch.nn.Module, *, batch: int = 2, length: int = 29, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens `[batch, length]` on the CPU; labels too, where the model takes them."""
    import inspect

    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(_text_config(model), "vocab_size", 100)
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    names = inspect.signature(type(model).forward).parameters
    if "input_ids" not in names:
        raise CommandError(f"{type(model).__name__} takes no input_ids: it cannot be run on random tokens")
    return {"input_ids": ids} | ({"labels": ids.clone()} if "labels" in names else {})


def loss_of(output: Any) -> Tensor:
    """The mean square of the last hidden state, where the model gives none."""
    loss = getattr(output, "loss", None)
    return output[0].float().square().mean() if loss is None else loss


def positions_of(model: torch.nn.Module) -> int:
    """How long a sequence its configuration allows for; a model without positions takes any."""
    return getattr(_text_config(model), "max_position_embeddings", None) or sys.maxsize


def _text_config(model: torch.nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config()


@torch.no_grad()
def require_it_runs(model: torch.nn.Module, batch: dict[str, Tensor], name: str) -> None:
    """Raises `CommandError` for a model that does not run unpatched on this batch."""
    device, length = next(model.parameters()).device, batch["input_ids"].shape[1]
    try:
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    except Exception as error:
        limit = positions_of(model)
        few = f"; its configuration allows for {limit} tokens" if length > limit else ""
        raise CommandError(f"{name} does not run unpatched on {length} tokens: {named(error)}{few}") from error


def real_source_of(model: str) -> Source:
    """As `source_of`, but a model type gives a random model with the type's own sizes and a layer of each kind."""
    source = source_of(model)
    if not source.tiny:
        return source
    return Source(f"a random {model} of few layers", lambda seed, every: few_layers(model, seed=seed), tiny=False)


def sized_source_of(model: str, sizes: Mapping[str, str], real: bool) -> Source:
    """As `source_of` or, `real`, as `real_source_of`, with `sizes` of its configuration changed, which are JSON. A
    folder without weights gives a random model.

    Raises:
        CommandError: for a size that the configuration does not have, or a value that is not JSON.
    """
    stored = is_stored(model, model_types())
    files = {file.suffix for file in Path(model).glob("*")} if stored and Path(model).is_dir() else set(WEIGHTS)
    weightless = files.isdisjoint(WEIGHTS)
    if not sizes and not weightless:
        return real_source_of(model) if real else source_of(model)
    if stored:
        config = stored_configuration(model)
    else:
        source_of(model)  # or a CommandError
        config = few_layers_config(model) if real else tiny_config(model)
    for name, value in sizes.items():
        if not hasattr(config, name):
            raise CommandError(f"--size {name}={value}: {type(config).__name__} has no {name}")
        try:
            setattr(config, name, json.loads(value))
        except ValueError as error:
            raise CommandError(f"--size {name}={value}: accepted is JSON, such as 64 or [1, 2]") from error

    def make(seed: int, every_expert: bool) -> torch.nn.Module:
        try:
            return random_model(config, seed)
        except Exception as error:
            raise CommandError(f"no {model} of these sizes can be built ({named(error)})") from error

    return Source(f"a random {model}", make, tiny=False)
