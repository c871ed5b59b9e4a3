"""Loss and gradients of a model, and how far two tensors are apart: as `verify` measures it."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from npu_patch.commands.replay.bars import relative_error
from npu_patch.probe.gated_delta_reference import recurrence

__all__ = ["in_float64", "loss_and_gradients", "relative_error", "token_losses"]


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, as "loss", and the gradient of each parameter that has one, as float64 on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in {"loss": loss, **found}.items()}


def token_losses(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss of each token of a batch of text, ids `[B, S]` on the CPU: `[B * (S - 1)]`, float64."""
    ids = batch["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu().double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy on the CPU. Experts run eagerly: torch's grouped product has no float64. Gated delta nets, which
    cast to float32 themselves, run by definition."""
    copied = copy.deepcopy(model).cpu().double()
    for module in copied.modules():
        file = sys.modules[type(module).__module__]
        if "GatedDeltaNet" in type(module).__name__ and hasattr(file, "torch_chunk_gated_delta_rule"):
            module.forward = functools.partial(_by_definition, module.forward, file)
            if "chunk_gated_delta_rule" in vars(module):  # up to transformers 5.14 each layer keeps its own
                module.chunk_gated_delta_rule = _rule_by_definition
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    return copied


def _by_definition(forward: Callable[..., Tensor], file: ModuleType, *args: Any, **kwargs: Any) -> Tensor:
    with (
        mock.patch.object(file, "torch_chunk_gated_delta_rule", _rule_by_definition),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        return forward(*args, **kwargs)


def _rule_by_definition(
    query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, output_final_state: bool, **_: Any
) -> tuple[Tensor, Tensor | None]:
    o, final = recurrence(query, key, value, g, beta, normalize=True)
    return o, final if output_final_state else None
