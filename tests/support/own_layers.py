"""Modeling files of the tests' own, with one decoder layer whose forward ends as a test says."""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.support.parity import apart

# Of a modeling file: its imports and its norm.
RMS_NORM = """
import torch
from torch import nn

class RMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        n = x.float()
        n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * n.to(x.dtype)
"""
SOURCE = (
    RMS_NORM
    + """
class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        return self.proj(x)

class MLP(Mixer):
    def forward(self, x):
        return self.proj(x).tanh()

class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer, self.second, self.mlp = Mixer(config), Mixer(config), MLP(config)
        self.norm, self.other_norm = RMSNorm(config.hidden_size), RMSNorm(config.hidden_size)
        self.scale, self.early, self.last = None, False, None
        self.kind, self.steps = config.kind, config.steps

    def forward(self, hARGUMENTS):
        y = self.mixer(h)
        BODY
"""
)
NUMBERS = itertools.count()


def own_modeling(body: Sequence[str], arguments: str = "", before: str = "", after: str = "") -> types.ModuleType:
    """`body`: the lines after the mixer's call; `arguments`: of the forward, beside h; `before` and `after`: lines
    before the classes, and in the layer's class after its forward. The caller takes it out of `sys.modules`."""
    module = types.ModuleType(f"own_{next(NUMBERS)}.modeling_own")
    sys.modules[module.__name__] = module
    source = SOURCE.replace("ARGUMENTS", arguments and f", {arguments}").replace("BODY", "\n        ".join(body))
    exec(before + source + after, vars(module))
    return module


def own_layer(modeling: types.ModuleType, npu: torch.device) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = modeling.Layer(types.SimpleNamespace(hidden_size=12, kind="usual", steps=2)).to(npu)
    return layer, torch.randn(2, 3, 12).to(npu)


def run(layer: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """The layer's first result, and every gradient."""
    leaf = hidden.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    result = layer(leaf)
    first = result[0] if isinstance(result, tuple) else result
    assert type(first) is Tensor
    first.square().sum().backward()
    found = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().cpu() for name, tensor in {**found, "result": first, "h": leaf.grad}.items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return apart(found, expected) == {}
