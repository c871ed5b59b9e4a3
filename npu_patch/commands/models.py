"""MODEL on the command line: a model type, of which a small random model is made, or the name or folder of a model."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from npu_patch.commands.families import model_types, unknown
from npu_patch.commands.result import CommandError
from npu_patch.commands.tiny_model import auto_class, few_layers, tiny_model


@dataclass(frozen=True)
class Source:
    """`make(seed, every_expert)` gives the model, float32 or as it is stored, on the CPU."""

    described: str
    make: Callable[[int, bool], torch.nn.Module]
    tiny: bool


def add_arguments(parser: argparse.ArgumentParser, device: str = "npu") -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a model type of transformers, such as qwen3_moe (a small random model is made), or a model's folder",
    )
    parser.add_argument("--device", default=device, help=f"npu, cuda or cpu (default {device})")


def device_of(options: argparse.Namespace) -> torch.device:
    """Raises `CommandError` for a device that is none here."""
    from npu_patch.lifecycle import DEVICE_TYPES, lacking

    name = options.device.split(":", 1)[0]
    if name not in DEVICE_TYPES:
        raise CommandError(f"--device {options.device}: accepted are {', '.join(DEVICE_TYPES)}")
    reason = lacking(name)
    if reason is not None:
        raise CommandError(f"--device {options.device}: {reason}")
    return torch.device(options.device)


def source_of(model: str) -> Source:
    """Raises `CommandError` for a MODEL that is neither a model type nor a model, with the near names."""
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise CommandError(f"MODEL {model}: the folder has no config.json")
        return Source(model, lambda seed, every_expert: _stored(model), tiny=False)
    known = model_types()
    if model in known:
        return Source(
            f"a tiny random {model}", lambda seed, every: tiny_model(model, seed=seed, every_expert=every), tiny=True
        )
    if "/" in model:
        return Source(model, lambda seed, every_expert: _stored(model), tiny=False)
    raise CommandError(unknown(model, known))


def _stored(name: str) -> torch.nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
        return auto_class(config).from_pretrained(name, dtype="auto").eval()
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise CommandError(f"MODEL {name} cannot be loaded: {type(error).__name__}: {first}") from error


def batch_for(model: torch.nn.Module, *, batch: int = 2, length: int = 29, seed: int = 1) -> dict[str, Tensor]:
    """Random tokens `[batch, length]` on the CPU; labels too, where the model takes them."""
    import inspect

    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", 100)
    ids = torch.randint(2, vocabulary, (batch, length), generator=generator)
    names = inspect.signature(type(model).forward).parameters
    if "input_ids" not in names:
        raise CommandError(f"{type(model).__name__} takes no input_ids: it cannot be run on random tokens")
    return {"input_ids": ids} | ({"labels": ids.clone()} if "labels" in names else {})


def real_source_of(model: str) -> Source:
    """As `source_of`, but a model type gives a random model with the type's own sizes and a layer of each kind."""
    source = source_of(model)
    if not source.tiny:
        return source
    return Source(f"a random {model} of few layers", lambda seed, every: few_layers(model, seed=seed), tiny=False)
