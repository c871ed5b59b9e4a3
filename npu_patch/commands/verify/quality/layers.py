"""What each layer loses: the original runs, and each layer's counterpart computes from the very same inputs."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from npu_patch.checkpoints.w8a8 import SCALE
from npu_patch.commands.console.result import CommandError
from npu_patch.commands.verify.quality.logits import relative_error
from npu_patch.commands.verify.quality.stored import is_int8, worth


@dataclass
class LayerError:
    """Of a layer's outputs, or of those of a kind of layers: sums of squares. `of_weights`: with inputs as they are."""

    name: str
    kind: str
    int8: bool
    calls: int = 0
    squares: float = 0.0
    of_all: float = 0.0
    of_weights: float = 0.0

    def add(self, expected: Tensor, found: Tensor, weights_only: Tensor) -> None:
        wide = expected.float()
        self.calls += 1
        self.squares += float(wide.square().sum())
        self.of_all += float((found.float() - wide).square().sum())
        self.of_weights += float((weights_only.float() - wide).square().sum())

    def __iadd__(self, other: LayerError) -> LayerError:
        self.calls += other.calls
        self.squares += other.squares
        self.of_all += other.of_all
        self.of_weights += other.of_weights
        return self

    @property
    def error(self) -> float:
        return relative_error(self.of_all, self.squares)

    @property
    def weights_error(self) -> float:
        return relative_error(self.of_weights, self.squares)

    def as_content(self) -> dict[str, Any]:
        numbers = {"error": self.error, "weights_error": self.weights_error}
        return {"name": self.name, "kind": self.kind, "int8": self.int8, "calls": self.calls} | numbers


@dataclass(frozen=True)
class Differing:
    """Names of modules. `layers`: with matrices; `others`: norms, embeddings; `equal`: how many are the same."""

    layers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    equal: int = 0


def differing(original: torch.nn.Module, other: torch.nn.Module) -> Differing:
    """
    Raises:
        CommandError: where the modules of the two are not alike.
    """
    theirs = dict(other.named_modules())
    layers, others, equal = [], [], 0
    for name, module in original.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue
        found = dict(theirs[name].named_parameters(recurse=False)) if name in theirs else {}
        ours = {n: list(p.shape) for n, p in own.items()}
        given = {n: list(p.shape) for n, p in found.items() if not n.endswith(SCALE) or n in own}
        if ours != given:
            raise CommandError(f"MODEL is no copy of ORIGINAL: {name} has {given or 'nothing'}, ORIGINAL's {ours}")
        if all(torch.equal(p, found[n]) for n, p in own.items()):
            equal += 1
        elif any(p.dim() > 1 for p in own.values()) and not isinstance(module, torch.nn.Embedding):
            layers.append(name)
        else:
            others.append(name)
    return Differing(layers, others, equal)


@contextlib.contextmanager
def watched(original: torch.nn.Module, other: torch.nn.Module, names: Iterable[str]) -> Iterator[list[LayerError]]:
    """While the original runs, what these layers lose is added up in the list."""
    errors, hooks = [], []
    for name in names:
        counterpart = other.get_submodule(name)
        errors.append(LayerError(name, kind_of(name), is_int8(counterpart)))
        hook = _Hook(errors[-1], counterpart)
        hooks.append(original.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        yield errors
    finally:
        for each in hooks:
            each.remove()


class _Hook:
    """What the weights alone cost, the original's layer says with the counterpart's in place of its own."""

    def __init__(self, error: LayerError, counterpart: torch.nn.Module) -> None:
        self.error, self.counterpart = error, counterpart
        self.asked = False

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.asked:
            return
        weights = {n: worth(self.counterpart, n, p.dtype) for n, p in module.named_parameters(recurse=False)}
        self.asked = True
        try:
            weights_only = functional_call(module, weights, args, kwargs)
        finally:
            self.asked = False
        found = self.counterpart(*args, **kwargs) if self.error.int8 else weights_only
        self.error.add(*(each if isinstance(each, Tensor) else each[0] for each in (output, found, weights_only)))


def kind_of(name: str) -> str:
    """What stands behind the layer's number; experts of all numbers are one kind."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", re.sub(r"^.*?\.\d+\.", "", name))


def by_kind(errors: Iterable[LayerError]) -> list[LayerError]:
    """The costliest first."""
    kinds: dict[str, LayerError] = {}
    for each in errors:
        if each.calls:
            kind = kinds.setdefault(each.kind, LayerError(each.kind, each.kind, each.int8))
            kind += each
    return costliest(list(kinds.values()))


def costliest(errors: Sequence[LayerError]) -> list[LayerError]:
    """What is not a number costs most."""
    return sorted((each for each in errors if each.calls), key=lambda each: (not math.isnan(each.error), -each.error))
