"""Experts in int8, which transformers' experts registry finds under a name of ours: loading registers it, and a model
that has such experts asks for it in its configuration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from npu_patch.ops.readings import NotRead
from npu_patch.ops.w8a8.experts import REGISTERED, TORCH, Int8Experts, Int8Weights, int8_experts
from npu_patch.patches.experts.patch import READINGS, registry
from npu_patch.probe.experts import ExpertsReading, gate_of

FLOATS = "grouped_mm"  # transformers' own, for layers of the model that are not int8
DOWN, SCALE = "down_proj", "_scale"


def register() -> None:
    """Once, and for good: what is loaded keeps computing, whatever is restored.

    Raises:
        ImportError: this transformers has no experts registry.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(REGISTERED, forward)


def forward(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What is registered. The layers of a model that are not int8 go on as they would."""
    if getattr(self, DOWN).is_floating_point():
        return registry()[FLOATS](self, hidden_states, top_k_index, top_k_weights)
    return computed(self, hidden_states, top_k_index, top_k_weights)


def computed(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """In plain torch, on every device; where npu_patch is applied, by the device's operators."""
    tokens = in_autocast(hidden_states)
    y = int8_experts(TORCH, tokens, top_k_index, top_k_weights, experts_of(self))
    return y.to(hidden_states.dtype)


def in_autocast(tokens: Tensor) -> Tensor:
    device_type = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else tokens


def experts_of(layer: torch.nn.Module) -> Int8Experts:
    """The layer's at this call.

    Raises:
        NotImplementedError: it computes what int8 experts do not; `why_not` says so as it is loaded.
    """
    reading = READINGS.of(layer)
    why = reading.reason if isinstance(reading, NotRead) else why_not(layer, reading)
    if why is not None:
        raise NotImplementedError(f"int8 experts of {type(layer).__name__}: {why}")
    up, down = (_weights(layer, name, reading.convention.transposed) for name in (reading.convention.up_name, DOWN))
    return Int8Experts(up, down, gate_of(reading, layer))


def why_not(layer: torch.nn.Module, reading: ExpertsReading) -> str | None:
    """What int8 experts do not compute of what these do."""
    if reading.convention.has_bias:
        return "experts with biases"
    if reading.convention.has_post_expert_norm:
        return "a norm after each expert"
    if getattr(layer, "_is_expert_parallel", False):
        return "experts on several ranks"
    return None


def names_of(reading: ExpertsReading) -> Sequence[str]:
    return reading.convention.up_name, DOWN


def _weights(layer: torch.nn.Module, name: str, transposed: bool) -> Int8Weights:
    values, scale = getattr(layer, name), getattr(layer, name + SCALE)
    return Int8Weights(values if transposed else values.mT, scale.flatten(1))
