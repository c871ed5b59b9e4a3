"""Loss and gradients of a model, and how far two sets of them are apart."""

from __future__ import annotations

import copy

import torch
from torch import Tensor


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The loss, as "loss", and the gradient of each parameter that has one, as float64 on the CPU."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in {"loss": loss, **found}.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def token_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The loss of each token of ids `[B, S]` on the CPU: `[B * (S - 1)]`, float64."""
    with torch.no_grad():
        logits = model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu().double()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy on the CPU. Experts run eagerly: torch's grouped product has no float64."""
    copied = copy.deepcopy(model).cpu().double()
    for module in copied.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    return copied
