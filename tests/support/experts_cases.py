"""Every experts class of the installed transformers that takes tokens, indices and router weights, built tiny."""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

WORDS = {"act": "silu", "activation": "silu", "eps": 1e-6}
OPTIONAL = ("moe_latent_size",)
# Their forwards are something else: every expert for every token, expert sizes on the host, per-expert modules.
OTHERS = (
    "Llama4TextExperts",
    "InklingSharedExperts",
    "JetMoeParallelExperts",
    "NllbMoeExperts",
    "SwitchTransformersExperts",
)


@dataclass
class TinyConfig:
    """Answers whatever an experts class asks its config for, by the name of what it asks."""

    hidden: int
    inner: int
    experts: int
    _experts_implementation: str = "grouped_mm"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in OPTIONAL:
            if name in OPTIONAL:
                return None
            raise AttributeError(name)
        last = name.rsplit("_", 1)[-1]
        if last in WORDS:
            return WORDS[last]
        if "zero_expert" in name:
            return 2
        if "experts" in name:
            return self.experts
        if "intermediate" in name or "ffn" in name:
            return self.inner
        if name.endswith("hidden_size"):
            return self.hidden
        return 7.0 if "limit" in name or "cap" in name else 1.7


def experts_classes() -> dict[str, str]:
    """The module of each of them, by "family.Class". Read and not imported: every later `apply()` without a model looks
    at what is imported."""
    found: dict[str, str] = {}
    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        if "Experts(nn.Module)" in source:
            family, module = path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}"
            classes = filter(_takes_routed_tokens, ast.parse(source).body)
            found |= {f"{family}.{each.name}": module for each in classes if isinstance(each, ast.ClassDef)}
    return found


def _takes_routed_tokens(node: ast.stmt) -> bool:
    if not isinstance(node, ast.ClassDef) or not node.name.endswith("Experts") or node.name in OTHERS:
        return False
    forwards = (each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "forward")
    return any(len(forward.args.args) == len(("self", "tokens", "indices", "weights")) for forward in forwards)


@contextlib.contextmanager
def forgetting_modeling_files() -> Iterator[None]:
    """Those that are imported meanwhile, so that no later `apply()` looks at them."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\w+", name):
            package, _, file = name.rpartition(".")
            vars(sys.modules.get(package)).pop(file, None)
            del sys.modules[name]


def built(cls: type, *, hidden: int, inner: int, experts: int, seed: int = 0, implementation: str = "eager") -> Any:
    """An instance with random parameters, on the CPU, float32."""
    config = TinyConfig(hidden, inner, experts, implementation)
    module = cls(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale * 2)
    return module.train()


@dataclass(frozen=True)
class Routing:
    """Arguments of a forward, on the CPU in float32."""

    tokens: Tensor
    indices: Tensor
    router_weights: Tensor


def routing(*, tokens: int, hidden: int, experts: int, choices: int, seed: int = 0) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts, generator=generator).topk(choices, -1).indices
    weights = torch.rand(tokens, choices, generator=generator).softmax(-1)
    return Routing(torch.randn(tokens, hidden, generator=generator), indices, weights)


def outputs_and_gradients(module: Any, given: Routing) -> dict[str, Tensor]:
    """The result and every gradient for one random gradient of the result, as float64 on the CPU. Gradients are those
    of tokens, router weights and of each parameter that asks for one."""
    parameter = next(module.parameters())
    tokens, weights = (
        each.detach().clone().to(parameter.device, parameter.dtype).requires_grad_(True)
        for each in (given.tokens, given.router_weights)
    )
    module.zero_grad(set_to_none=True)
    result = module(tokens, given.indices.to(parameter.device), weights)
    seed = torch.randn(result.shape, generator=torch.Generator().manual_seed(99))
    result.backward(seed.to(result.device, result.dtype))
    found = {"result": result, "tokens": tokens.grad, "router_weights": weights.grad}
    found |= {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}
