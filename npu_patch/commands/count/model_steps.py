"""What is counted: a training step and a decoded token of a model, unpatched and patched; or, of one that is given
pictures, a training step and its tower's part."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import npu_patch
from npu_patch import simulator
from npu_patch.commands.count.costs import Costs
from npu_patch.commands.count.layers import Layers
from npu_patch.commands.count.level_two import LevelTwo
from npu_patch.commands.subject.models import loss_of
from npu_patch.serving.signature import tensors_in

TRAINING, DECODING, TOWER = "training step", "decoded token", "tower"


@dataclass(frozen=True)
class Counting:
    costs: Costs
    peak_bytes: int  # of device memory, beyond what was there before


def counted_steps(
    model: torch.nn.Module, batch: Mapping[str, Tensor], switches: Mapping[str, Any]
) -> dict[str, Counting]:
    """By the name of the step. `model` and `batch` are on the simulated device; no optimizer takes part."""
    found = {}
    with npu_patch.applied(model, **switches):
        model.train()
        found[TRAINING] = _counted(model, partial(_trained, model), batch)
        if "pixel_values" in batch:
            found[TOWER] = _counted(model, partial(_tower_trained, model), batch)
            return found
        model.eval()
        if "past_key_values" in inspect.signature(_own(model).forward).parameters:
            with torch.no_grad():
                decode = _decoding(model, batch["input_ids"])
                if decode is not None:
                    found[DECODING] = _counted(model, lambda batch: decode(), {})
    return found


def laid_out(batch: Mapping[str, Tensor], packed: int, padding: int) -> dict[str, Tensor]:
    """As collators give it: positions of packed sequences, and a mask of padding at the left."""
    tokens = batch["input_ids"].shape[1]
    given = dict(batch)
    if packed > 1:
        given["position_ids"] = torch.arange(tokens)[None] % -(-tokens // packed)
    if padding:
        given["attention_mask"] = (torch.arange(tokens) >= padding).long()[None]
        if "labels" in batch:
            given["labels"] = batch["labels"].masked_fill(given["attention_mask"] == 0, -100)
    return given


def _counted(
    model: torch.nn.Module, step: Callable[[Mapping[str, Tensor]], None], batch: Mapping[str, Tensor]
) -> Counting:
    """Each step has tensors of its own, as from a loader: nothing of them is known from the step before."""
    first, second = ({name: tensor.clone() for name, tensor in batch.items()} for _ in range(2))
    layers, level_two = Layers(model), LevelTwo()
    with simulator.count(Costs(layers, level_two)):
        step(first)  # whatever is made once; and the cache is then as a step before leaves it
    npu, costs = torch.get_device_module("npu"), Costs(layers, level_two)
    before = npu.memory_allocated()
    npu.reset_peak_memory_stats()
    with simulator.count(costs):
        step(second)
    return Counting(costs, npu.max_memory_allocated() - before)


def _trained(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> None:
    no_cache = {"use_cache": False} if "use_cache" in inspect.signature(_own(model).forward).parameters else {}
    loss_of(model(**batch, **no_cache)).backward()
    model.zero_grad(set_to_none=True)


def _tower_trained(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Forward and, where something of it is trained, backward."""
    features: Any = _own(model).get_image_features
    names = inspect.signature(features).parameters
    found = features(**{name: tensor for name, tensor in batch.items() if name in names})
    parts = getattr(found, "pooler_output", found)
    loss = torch.stack([part.float().square().mean() for part in tensors_in(parts)]).sum()
    if loss.requires_grad:
        loss.backward()
    model.zero_grad(set_to_none=True)


def _decoding(model: torch.nn.Module, prompt: Tensor) -> Callable[[], None] | None:
    """A function that takes the likeliest next token, after the prompt; None for a model without logits or a cache."""
    output = model(input_ids=prompt, use_cache=True)
    if getattr(output, "past_key_values", None) is None or getattr(output, "logits", None) is None:
        return None
    token = output.logits[:, -1:].argmax(-1)

    def decode() -> None:
        nonlocal token
        given = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = given.logits[:, -1:].argmax(-1)

    return decode


def _own(model: torch.nn.Module) -> torch.nn.Module:
    """The model that peft wraps."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()
