"""A tiny layer of an attention class, made apart from the training script, and the arguments of its forward."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.values import values
from npu_patch.sites.sites import innermost

BATCH, LENGTH, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 2, 5, 12, 6, 2, 8
# What attention layers ask their config for; None for anything else. No two sizes could be confused.
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD_DIM,
    "query_pre_attn_scalar": 7,
    "rms_norm_eps": 1e-2,
    "layer_norm_eps": 1e-2,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_qk_norm": True,
    "max_position_embeddings": 32,
    "num_hidden_layers": 2,
    "partial_rotary_factor": 1.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "_attn_implementation": "eager",
    "layer_types": ("full_attention", "full_attention"),
    "use_sliding_window": False,
}


class Unobservable(Exception):
    """There is no such layer, or it cannot be called as attention layers are."""


class Config(SimpleNamespace):
    """None for whatever it does not have."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


def build(cls: type) -> torch.nn.Module:
    """A layer in evaluation mode with fixed weights. Call it in the quiet room, keeping torch's random state."""
    try:
        try:
            layer = cls(Config(**CONFIG), layer_idx=0)
        except TypeError:
            layer = cls(Config(**CONFIG))
    except Exception as error:
        unless_accident(error)
        raise Unobservable(f"no tiny layer of it could be made: {error_text(error)}") from error
    fill(layer, 60)
    return layer.eval()


def fill(layer: torch.nn.Module, seed: int) -> None:
    """With fixed weights."""
    for index, module in enumerate(layer.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(0.5 * values(parameter.shape, seed + index))


def arguments(layer: torch.nn.Module, dtype: torch.dtype, table_width: int) -> dict[str, Any]:
    """By the names under which attention layers of transformers take them; tables are numbers, not angles."""
    cos, sin = (values((BATCH, LENGTH, table_width), seed, dtype) for seed in (71, 72))
    known: dict[str, Any] = {
        "hidden_states": values((BATCH, LENGTH, HIDDEN), 70, dtype, grad=True),
        "position_embeddings": (cos, sin),
        "cos": cos,
        "sin": sin,
        "attention_mask": None,
    }
    given: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(innermost(type(layer).forward)).parameters.items())[1:]:
        if name in known:
            given[name] = known[name]
        elif parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            given[name] = None
    if "hidden_states" not in given:
        raise Unobservable("its forward takes no hidden_states")
    return given


def tensors_in(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for each in result for tensor in tensors_in(each)] if isinstance(result, (tuple, list)) else []
