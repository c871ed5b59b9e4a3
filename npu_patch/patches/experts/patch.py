"""Experts: every layer whose experts are packed into one weight each, by transformers' experts registry; and those that
ask no registry, by their own forward (packed.py, looped.py).

Rebinds    `ExpertsInterface['grouped_mm']` and `['batched_mm']`, which every registered experts class looks up at call
           time and between which generation switches; `forward` of unregistered classes; in transformers 4 `forward` or
           `moe` of blocks that loop over a ModuleList.
To         `npu_moe_token_permute` -> `npu_grouped_matmul` -> `npu_swiglu` -> `npu_grouped_matmul` ->
           `npu_moe_token_unpermute`. A gate that is no SwiGLU, and a norm after the experts, are called as they are.
Not when   the config asks for "eager" or another implementation, or the layer's own forward was observed to compute
           something else. A call falls through for tensors on another device, DTensors, weights that are no floats and
           the operators' limits.
Delete     when transformers' grouped_mm runs a grouped kernel on NPU and leaves frozen weights without gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.routed import EXPERTS, silu_of_halves
from npu_patch.ops.readings import NotRead
from npu_patch.ops.w8a8.experts import REGISTERED as INT8
from npu_patch.patches.experts import looped as experts_looped
from npu_patch.patches.experts import packed as experts_packed
from npu_patch.patches.patch import Context, Patch, Replacement, layers_of_class
from npu_patch.probe.experts import SETTINGS, Convention, ExpertsReading, declared, read_experts
from npu_patch.probe.readings import Readings
from npu_patch.sites.sites import LiveModules, Site, forwards, innermost
from npu_patch.sites.whose import is_ours

DOORS = ("grouped_mm", "batched_mm")
ARGUMENTS = ("hidden_states", "top_k_index", "top_k_weights")


def registered() -> Iterable[Site]:
    entries = registry()
    if entries is not None:
        for name in DOORS:
            if name in entries:
                yield Site(entries, name, entries[name], f"ExpertsInterface[{name!r}]")


def find(module: ModuleType) -> Iterable[Site]:
    entries = registry()
    for site in chain(experts_packed.find(module), experts_looped.find(module)):
        if entries is None or not _looks_up(site.owner, entries):
            yield site


def in_layer(layer: torch.nn.Module) -> Iterable[Site]:
    """Live experts that the registry does not serve. Those in int8 have a patch of their own."""
    entries = registry()
    if asked_for(layer) == INT8:
        return
    if entries is not None and _looks_up(type(layer), entries) and _why_unserved(layer) is not None:
        yield Site(layer, "forward", None, f"{type(layer).__module__}.{type(layer).__qualname__}")


def read_site(site: Site) -> Any:
    """A reading of the kind of site that it is, or NotRead."""
    if isinstance(site.owner, torch.nn.Module):
        return NotRead(_why_unserved(site.owner) or "")
    if isinstance(site.owner, type):
        return (experts_looped if experts_looped.is_block(site) else experts_packed).read_site(site)
    flags = {"_is_expert_parallel": False, "act_fn": torch.nn.functional.silu, "is_transposed": False}
    flags |= {"has_bias": False, "has_gate": True, "has_post_expert_norm": False, "is_concatenated": True}
    observed = read_experts(_StandardExperts, site.original, flags, [Convention()])
    if isinstance(observed, NotRead):
        return NotRead(f"what is registered there computes something else: {observed.reason}")
    return observed


def bind_site(site: Site, reading: Any, context: Context) -> Replacement | NotRead:
    if not isinstance(site.owner, type):
        return _bind_entry(site, context)
    if experts_looped.is_block(site):
        return experts_looped.bind_site(site, reading, context)
    return experts_packed.bind_site(site, context)


def _bind_entry(site: Site, context: Context) -> Replacement:
    """Of the registry."""

    def observe(layer: torch.nn.Module) -> None:
        if _looks_up(type(layer), site.owner):
            READINGS.of(layer)

    for module in context.live or ():
        observe(module)
    asking = partial(_asking, site)
    return experts_packed.replacement(site, ARGUMENTS, READINGS, context, asking, observe, _own_forward)


def _asking(site: Site, live: LiveModules) -> Iterator[torch.nn.Module]:
    """The live layers whose config asks for an entry of the registry."""
    return (each for each in live if _looks_up(type(each), site.owner) and asked_for(each) == site.name)


def layers(site: Site, context: Context) -> int | None:
    """Of a registry's entry: the live experts that it serves."""
    entries = registry()
    if entries is None or site.owner is not entries or context.live is None:
        return layers_of_class(site, context)
    return sum(_why_unserved(module) is None for module in _asking(site, context.live))


def registry() -> dict[str, Any] | None:
    """None in transformers 4."""
    try:
        from transformers.integrations.moe import ExpertsInterface
    except ImportError:
        return None
    return ExpertsInterface._global_mapping


def _looks_up(cls: type, registry: dict[str, Any]) -> bool:
    """Whether the forward of `cls` is the one that transformers' decorator made around this very registry."""
    forward = getattr(cls, "forward", None)
    held = [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    if isinstance(forward, FunctionType):  # transformers < 5.3 has it as a global
        held += [forward.__globals__.get(name) for name in forward.__code__.co_names]
    return any(getattr(value, "_global_mapping", None) is registry for value in held)


def asks_registry(module: torch.nn.Module) -> bool:
    """Whether its forward looks up in transformers' registry who computes it."""
    entries = registry()
    return entries is not None and _looks_up(type(module), entries)


def asked_for(module: torch.nn.Module) -> str | None:
    """The implementation of experts in its configuration."""
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


def _why_unserved(module: torch.nn.Module) -> str | None:
    asked = asked_for(module)
    if asked not in DOORS:
        return f"its config asks for the experts implementation {asked!r}"
    reading = READINGS.of(module)
    return reading.reason if isinstance(reading, NotRead) else None


def registered_reading(module: torch.nn.Module) -> ExpertsReading | None:
    """How experts read their weights that our function in the registry serves; None of every other layer."""
    entries = registry()
    if entries is None or not _looks_up(type(module), entries) or not is_ours(entries.get(str(asked_for(module)))):
        return None
    reading = READINGS.of(module)
    return None if isinstance(reading, NotRead) else reading


def _read(cls: type[torch.nn.Module], attributes: Mapping[str, Any]) -> ExpertsReading | NotRead:
    """The truth is the class's own forward, inside the decorator's."""
    return read_experts(cls, innermost(cls.forward), attributes, [declared(attributes)])


def _own_forward(layer: torch.nn.Module, *_: Any) -> Any:
    """The layer's eager one: the registry's functions have no float64."""
    return innermost(type(layer).forward)


class _StandardExperts:
    """What the registry's functions are observed on."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        return silu_of_halves(gate_up)


def customers(module: ModuleType) -> Iterable[type]:
    entries = registry()
    return () if entries is None else (site.owner for site in forwards(module) if _looks_up(site.owner, entries))


READINGS: Readings[ExpertsReading] = Readings(_read, SETTINGS)
NAMED = ("experts",)
PATCH = Patch(
    "experts", "moe_patch", EXPERTS, find, read_site, bind_site, registered, in_layer, layers, customers, called=NAMED
)
