"""What others took since it was patched: sites, names of patched classes, and layers, by another class or by a forward
of their own. Who took several alike is said once.

A model may be gone when somebody asks: its layers are looked at before the first step of an optimizer too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch.optim import optimizer as torch_optimizer

from npu_patch.applying.patched_site import Stack, why_not_run
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import bound_forward, defining_class
from npu_patch.sites.whose import whose

FIRST_STEP = torch_optimizer._global_optimizer_pre_hooks
Key = tuple[int, str]  # of a site
# Layers that a patched site served when they were made or given.
Layers = WeakKeyDictionary[torch.nn.Module, Key]
Sites = Mapping[Key, Stack]


@dataclass
class Seen:
    """Layers that somebody took, in words, as they were before the first step."""

    layers: dict[str, tuple[int, WeakSet[torch.nn.Module]]] = field(default_factory=dict)
    done: bool = False

    def hook(self, look: Callable[[], Mapping[str, list[torch.nn.Module]]]) -> Callable[..., None]:
        def before_step(*_: Any) -> None:
            if not self.done and not torch.compiler.is_compiling():
                self.done = True
                self.layers = {what: (len(layers), WeakSet(layers)) for what, layers in look().items()}

        return before_step

    def gone(self) -> dict[str, int]:
        """Of which nobody can be asked any more."""
        return {what: count for what, (count, layers) in self.layers.items() if not layers}


def in_words(patched: Sites, layers: Layers, known: Container[torch.nn.Module], seen: Seen) -> list[str]:
    """`known`: layers with a forward of their own from before."""
    alike: dict[tuple[str, str], list[Stack]] = {}
    for stack in patched.values():
        for reason in filter(None, (why_not_run(stack), why_not_made(stack))):
            alike.setdefault((_patches(stack), reason), []).append(stack)
    lines = [f"{patches}: {_sites(stacks)}: {reason}" for (patches, reason), stacks in alike.items()]
    counts = {what: len(theirs) for what, theirs in layers_taken(patched, layers, known).items()} | seen.gone()
    return lines + [f"{what} on {count} layers: this patch no longer runs there" for what, count in counts.items()]


def layers_taken(patched: Sites, layers: Layers, known: Container[torch.nn.Module]) -> dict[str, list[torch.nn.Module]]:
    """By which patches lost them to whom, in words."""
    found: dict[str, list[torch.nn.Module]] = {}
    for layer, key in list(layers.items()):
        stack = patched.get(key)
        theirs = None if stack is None or layer in known else _theirs(layer, stack)
        if stack is not None and theirs is not None:
            what = f"{_patches(stack)}: {stack[-1].site.label}: bound anew by {whose(theirs)}"
            found.setdefault(what, []).append(layer)
    return found


def note_layers(model: torch.nn.Module, patched: Sites, layers: MutableMapping[torch.nn.Module, Key]) -> None:
    for layer in model.modules():
        key = (id(defining_class(layer)), "forward")
        if key in patched:
            layers.setdefault(layer, key)


def why_not_made(stack: Stack) -> str | None:
    """Who took the name of a patched class, if anybody did: layers that are made from now on are of theirs."""
    cls = stack[-1].site.owner
    if not isinstance(cls, type) or "." in cls.__qualname__:
        return None
    named = getattr(sys.modules.get(cls.__module__), cls.__name__, cls)
    return None if named is cls else f"its name is {whose(named)} now: layers that are made from now on are not served"


def _theirs(layer: torch.nn.Module, stack: Stack) -> Any:
    """What the layer runs in the place of the forward at its site, if anything."""
    bound = bound_forward(layer, (stack[0].site.original, stack[-1].replacement.function))
    if bound is not None:
        return None if bound.reachable else bound.bound
    cls = defining_class(layer)
    comes_back = stack[-1].site.owner in cls.__mro__ and "super" in names_used(vars(cls)["forward"])
    return None if cls is stack[-1].site.owner or comes_back else cls


def _sites(stacks: Iterable[Stack]) -> str:
    """Those with layers first."""
    first, *others = sorted(stacks, key=lambda stack: -(stack[-1].outcome.reached or 0))
    return first[-1].site.label + (f" and {len(others)} more alike" if others else "")


def _patches(stack: Stack) -> str:
    return ", ".join(dict.fromkeys(held.outcome.patch for held in stack))
