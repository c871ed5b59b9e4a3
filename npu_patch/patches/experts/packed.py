"""Experts in packed weights whose forward asks no registry: step3p7, longcat_flash, and in transformers 4 gpt_oss and
qwen3_vl_moe with arguments in an order of their own. Part of the patch in patch.py.

Which argument is what, how the weights are stored and what the gate is, is observed; see probe/experts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import Weights
from npu_patch.ops.experts.routed import Experts
from npu_patch.ops.readings import NotRead
from npu_patch.ops.weight_format import plain
from npu_patch.patches.experts.checked import checks, route
from npu_patch.patches.patch import Context, Replacement
from npu_patch.probe.experts import (
    ARGUMENTS,
    SETTINGS,
    WEIGHTS,
    ExpertsReading,
    gate_of,
    read_experts,
    undeclared_conventions,
)
from npu_patch.probe.readings import Readings
from npu_patch.serving.bypassed import SILU, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.listeners import listener_among
from npu_patch.serving.replacement import Unserved, replacement_for, tensors_on
from npu_patch.sites.sites import LiveModules, Site, forwards, parameter_names

# Settings that the gates of probe/experts.py read, for observing a class of which there is no instance yet.
TYPICAL = {"limit": 7.0, "alpha": 1.7, "training": True}


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of three arguments that read weights of a known name, and whatever calls itself experts."""
    for site in forwards(module):
        reads_weights = not set(WEIGHTS).isdisjoint(site.original.__code__.co_names)
        if (reads_weights and len(parameter_names(site.original) or ()) == 3) or _is_called_experts(site.owner):
            yield site


def read_site(site: Site) -> ExpertsReading | NotRead:
    names = parameter_names(site.original) or ()
    if len(names) != 3:
        return NotRead(f"its {len(names)} arguments are not tokens, indices and router weights")
    found = read_experts(site.owner, site.original, TYPICAL, undeclared_conventions())
    return found.notable_if(_is_called_experts(site.owner)) if isinstance(found, NotRead) else found


def bind_site(site: Site, context: Context) -> Replacement:
    """Each layer is read as its settings are."""
    cls, original, names = site.owner, site.original, parameter_names(site.original) or ()

    def read(its_class: type, attributes: Mapping[str, Any]) -> ExpertsReading | NotRead:
        return read_experts(its_class, original, attributes, undeclared_conventions())

    readings: Readings[ExpertsReading] = Readings(read, SETTINGS)
    for module in context.live_modules(cls):
        readings.of(module)
    return replacement(site, names, readings, context, lambda live: live.of(cls), readings.of)


def replacement(
    site: Site,
    names: Sequence[str],
    readings: Readings[ExpertsReading],
    context: Context,
    layers_in: Callable[[LiveModules], Iterable[torch.nn.Module]],
    observe: Callable[[torch.nn.Module], Any],
    definition: Callable[..., Callable[..., Any]] | None = None,
) -> Replacement:
    """Of a forward, or of a registry's function, with parameters `names`, that serves the layers that `layers_in` finds
    in a model."""
    calls = Calls()

    def live_experts(live: LiveModules) -> Iterator[Experts | None]:
        for module in layers_in(live):
            reading = readings.of(module)
            yield None if isinstance(reading, NotRead) else experts_of(module, reading)

    dispatch = context.dispatch(lambda live: checks(live_experts(live)))

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = tensors_on(context.device_type, names, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        reading = readings.of(self)
        if isinstance(reading, NotRead):
            return Unserved(reading.reason)
        heard = listener_in(self)
        if heard is not None:
            return Unserved(heard)
        convention = reading.convention
        if convention.arguments != ARGUMENTS:
            bound = [bound[convention.arguments.index(role)] for role in ARGUMENTS]
        tokens, indices, router_weights = bound
        shape = tokens.shape
        if reading.batched:
            tokens = tokens.reshape(-1, shape[-1])
        experts = experts_of(self, reading)
        if experts is None:
            return Unserved("it has no experts")
        if convention.dense:
            if router_weights.dim() != 2 or router_weights.shape[0] != indices.shape[0]:
                return Unserved(f"router weights of shape {tuple(router_weights.shape)}")
            router_weights = router_weights.gather(1, indices.clamp(max=router_weights.shape[1] - 1))
        result = route(dispatch, calls, tokens, indices, router_weights, experts)
        if isinstance(result, str):
            return Unserved(result)
        if convention.identities:
            others = router_weights.masked_fill(indices < experts.down.groups, 0.0)
            result = result + tokens * others.sum(-1, keepdim=True).to(tokens.dtype)
        return result.view(shape[0], -1, shape[-1]) if reading.batched else result

    def original(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        """It takes slices of weights, which ones in blocks do not have."""
        plain(self)
        return site.original(self, *args, **kwargs)

    bypassed = Bypassed.by(site.original, SILU)
    function = replacement_for(original, calls, serve, named_after=site.original, bypassed=bypassed)
    return Replacement(function, "routed experts", calls, dispatch=dispatch, observe=observe, definition=definition)


def listener_in(module: torch.nn.Module) -> str | None:
    """Who listens to the activation, or to another part of a packed layer that is not called as it is."""
    return "an _apply_gate of its own" if "_apply_gate" in vars(module) else listener_among(module)


def experts_of(module: Any, reading: ExpertsReading) -> Experts | None:
    """The experts of a packed layer at this call: each weight is read once, and nothing of it is kept."""
    convention = reading.convention
    up, down = getattr(module, convention.up_name), module.down_proj
    if up is None or down is None:
        return None
    up_bias = getattr(module, f"{convention.up_name}_bias") if convention.has_bias else None
    down_bias = module.down_proj_bias if convention.has_bias else None
    if convention.identities:
        up = up[: down.shape[0]]
    return Experts(
        up=(Weights((up,), convention.transposed, up_bias),),
        down=Weights((down,), convention.transposed, down_bias),
        gate=gate_of(reading, module),
        after=module.post_expert_norm if convention.has_post_expert_norm else None,
        # Versions without the flag may send sentinels any time, unregistered classes too.
        sentinels=convention.identities or getattr(module, "_is_expert_parallel", True),
    )


def _is_called_experts(cls: type) -> bool:
    return cls.__name__.endswith("Experts")
