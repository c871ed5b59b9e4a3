"""Layers that compute the convolution inline unless their attribute for it holds a function (transformers <= 5.14).

    if self.causal_conv1d_fn is not None:
        x = self.causal_conv1d_fn(x=x, weight=..., bias=..., activation=..., seq_idx=...)
    else:
        x = F.silu(self.conv1d(x)[:, :, :x.shape[-1]])

A data descriptor on the class answers in place of an instance's None, for layers made earlier, later and by deepcopy
alike; what the instances hold stays as it is. That the layer then computes the same is observed on a tiny one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.gated_delta.causal_conv1d import causal_conv1d
from npu_patch.ops.readings import NotRead
from npu_patch.probe.gated_delta import CONVOLUTION, Reading
from npu_patch.probe.tiny_layer import Config, fill
from npu_patch.serving.listeners import listener
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site

# What the layers ask their config for, tiny and without two sizes that could be confused.
SIZES: dict[str, Any] = {
    "hidden_size": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
    "linear_conv_kernel_dim": 4,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "layer_types": ("linear_attention",),
}
# In units of the dtype's tolerance. float32: the order of four products; bfloat16: the inline form rounds before SiLU.
ALLOWED = {torch.float32: 8.0, torch.bfloat16: 4.0}
NAMES = ("x", "weight", "bias", "activation", "seq_idx")
# The inline form knows no boundaries of packed sequences, and applies SiLU whatever the activation is called.
READING = Reading(CONVOLUTION, NAMES, dict(zip(NAMES, NAMES, strict=True)), ("silu", "swish"), leaks=True)


class Door:
    """`layer.<name>`: what the layer holds, or `function` bound to the layer where it holds None."""

    def __init__(self, name: str, function: Callable[..., Any]) -> None:
        self.name, self.function = name, function

    def __get__(self, layer: Any, cls: type | None = None) -> Any:
        if layer is None:
            return self
        held = vars(layer).get(self.name)
        return held if held is not None or torch.compiler.is_compiling() else MethodType(self.function, layer)

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value

    def __delete__(self, layer: Any) -> None:
        del vars(layer)[self.name]


def inline(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Any, seq_idx: Any) -> Tensor:
    """What the layer computes itself: through its module, hooks included."""
    return F.silu(layer.conv1d(x)[:, :, : x.shape[-1]])


def why_inline(layer: torch.nn.Module) -> str | None:
    """Why the layer's module for the convolution is to be called, and not a function of its weight."""
    convolution = layer.conv1d
    if type(convolution) is not torch.nn.Conv1d:
        return f"conv1d is a {type(convolution).__name__}"
    return listener(convolution, "conv1d")


def find(module: ModuleType) -> Iterable[Site]:
    """Classes whose `__init__` keeps a None of the module under the same name."""
    for cls in list(vars(module).values()):
        if not isinstance(cls, type) or not issubclass(cls, torch.nn.Module) or cls.__module__ != module.__name__:
            continue
        names = names_used(vars(cls).get("__init__"))
        for name in sorted(names) if "conv1d" in names else ():
            if "conv1d" in name and vars(module).get(name, "absent") is None and name not in vars(cls):
                yield Site(cls, name, None)


@remembered
def read(cls: type, name: str) -> Reading | NotRead:
    """Whether a function in `name` is what the layer computes inline."""
    try:
        with quiet_room():
            return _observe(cls, name)
    except Exception as error:
        unless_accident(error)
        return NotRead(f"cannot be observed with a convolution of its own: {error_text(error)}")


def _observe(cls: type, name: str) -> Reading | NotRead:
    layer = cls(Config(**SIZES), layer_idx=0)
    if vars(layer).get(name, "absent") is not None:
        return NotRead("it holds a function", notable=False)
    fill(layer, 30)
    for dtype, allowed in ALLOWED.items():
        reason = _compare(layer.to(dtype), name, dtype, allowed)
        if reason is not None:
            return NotRead(reason)
    return READING


def _compare(layer: torch.nn.Module, name: str, dtype: torch.dtype, allowed: float) -> str | None:
    asked: list[Any] = []

    def fused(x: Tensor, weight: Tensor, bias: Any, activation: Any, seq_idx: Any) -> Tensor:
        asked.append(activation)
        return causal_conv1d(x, weight, bias, activation, seq_idx)

    def run(function: Any) -> tuple[list[Tensor], list[Tensor]]:
        vars(layer)[name] = function
        x = values((2, 7, SIZES["hidden_size"]), 50, dtype, grad=True)
        return [layer(x)], [x, *layer.parameters()]

    expected, expected_inputs = run(None)
    for function in (fused, functools.partial(inline, layer)):
        observed, inputs = run(function)
        far = distance(observed, expected, inputs, expected_inputs)
        if far > allowed:
            return f"its inline convolution is another: {far:.3g} tolerances away"
    return None if asked == ["silu"] else f"its forward does not call what is in {name}"
