"""Blocks of transformers 4 that loop over a ModuleList of feed-forward layers. Part of the patch in patch.py.

Rebinds    `forward` of blocks that choose experts by softmax (mixtral, qwen, olmoe, jamba, hunyuan ...), `moe` of those
           that are given the choice (deepseek, glm4_moe, dots1, longcat_flash).
To         grouped products over the list of the experts' own weights: nothing is stacked or copied.
Not when   the block chooses in another way (phimoe, ernie4_5_moe). A call falls through where an expert is more than
           three plain linear layers around a gate: LoRA on its layers, hooks, quantised or sharded weights, biases.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import Weights
from npu_patch.ops.experts.routed import Experts
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.experts.checked import checks, route
from npu_patch.patches.patch import Context, Replacement
from npu_patch.patches.swiglu import Activations
from npu_patch.probe.experts_looped import BlockReading, chosen, read_block, read_method
from npu_patch.probe.readings import Readings
from npu_patch.probe.swiglu import SwiGLUReading, read_swiglu
from npu_patch.serving.bypassed import LINEAR, MODULE_CALL, SILU, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.listeners import listener, listener_among
from npu_patch.serving.replacement import Unserved, bind, replacement_for, tensors_on
from npu_patch.sites.sites import Site, forwards, innermost, is_checkpointing_layer, parameter_names

METHOD = "moe"


def find(module: ModuleType) -> Iterable[Site]:
    """Forwards of one argument in classes whose code speaks of experts, and methods called moe."""
    for site in forwards(module):
        method = vars(site.owner).get(METHOD)
        if isinstance(method, FunctionType) and len(parameter_names(method) or ()) == 3:
            yield Site(site.owner, METHOD, method)
        elif is_block(site):
            yield site


def is_block(site: Site) -> bool:
    if site.name == METHOD:
        return True
    methods = [value for value in vars(site.owner).values() if isinstance(value, FunctionType)]
    speaks_of_experts = any("experts" in method.__code__.co_names for method in methods)
    return speaks_of_experts and len(parameter_names(site.original) or ()) == 1


@dataclass(frozen=True)
class UnknownBlock:
    """A block that chooses its experts in no known way. Worth saying of a model where they are in a list: blocks around
    packed experts speak of experts too."""

    why: NotRead


def read_site(site: Site) -> AsNamed | BlockReading | UnknownBlock | NotRead:
    if site.name == METHOD:
        return read_method(site.owner, site.original)
    if is_checkpointing_layer(site.owner):
        return NotRead("a checkpointing layer", notable=False)
    found = read_block(site.owner, site.original, {"training": False, "norm_topk_prob": True})
    return UnknownBlock(found) if isinstance(found, NotRead) else found


def bind_site(site: Site, reading: AsNamed | BlockReading | UnknownBlock, context: Context) -> Replacement | NotRead:
    if isinstance(reading, UnknownBlock):
        live = context.live_modules(site.owner)
        lists = [isinstance(getattr(each, "experts", None), torch.nn.ModuleList) for each in live]
        return reading.why.notable_if(any(lists))
    return (_bind_method if site.name == METHOD else _bind_forward)(site, reading, context)


def _bind_method(site: Site, reading: AsNamed | BlockReading, context: Context) -> Replacement:
    names = parameter_names(site.original) or ()
    calls, layers = Calls(), FeedForwards()
    dispatch = context.dispatch(lambda live: checks(map(layers.if_plain, live.of(site.owner))))

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = tensors_on(context.device_type, names, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        experts = layers.of(self)
        return Unserved(experts.reason) if isinstance(experts, NotRead) else _run(dispatch, calls, experts, *bound)

    bypassed = Bypassed.by(site.original, LINEAR, SILU, MODULE_CALL)
    function = replacement_for(site.original, calls, serve, bypassed=bypassed)
    return Replacement(function, reading.name, calls, dispatch=dispatch, observe=layers.observe)


def _bind_forward(site: Site, found: AsNamed | BlockReading, context: Context) -> Replacement:
    cls, original, names = site.owner, site.original, parameter_names(site.original) or ()
    readings: Readings[BlockReading] = Readings(lambda its_class, own: read_block(its_class, original, own))
    for module in context.live_modules(cls):
        readings.of(module)
    calls, layers = Calls(), FeedForwards()
    dispatch = context.dispatch(lambda live: checks(map(layers.if_plain, live.of(cls))))

    def serve(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = bind(names, args, kwargs)
        if bound is None or not isinstance(bound[0], Tensor) or bound[0].dim() != 3:
            return Unserved("arguments that are no [B, S, H] tensor")
        (x,) = bound
        if x.device.type != context.device_type:
            return Unserved(f"input on {x.device.type}")
        reading = readings.of(self)
        if isinstance(reading, NotRead):
            return Unserved(reading.reason)
        experts = layers.of(self)
        if isinstance(experts, NotRead):
            return Unserved(experts.reason)
        flat = x.reshape(-1, x.shape[-1])

        def part(which: Any) -> Tensor:
            return getattr(self, which.name)(flat if which.flat else x)

        logits = part(reading.router)
        indices, weights = chosen(logits, self.top_k, reading.normalised, x.dtype)
        result = _run(dispatch, calls, experts, flat, indices, weights)
        if isinstance(result, Unserved):
            return result
        if reading.shared is not None:
            shared = part(reading.shared).view(flat.shape)
            result = result + (shared if reading.shared_gate is None else part(reading.shared_gate).sigmoid() * shared)
        return (result.view(x.shape), logits) if reading.returns_logits else result.view(x.shape)

    def observe(block: torch.nn.Module) -> None:
        readings.of(block)
        layers.observe(block)

    bypassed = Bypassed.by(original, LINEAR, SILU, MODULE_CALL)
    function = replacement_for(original, calls, serve, bypassed=bypassed)
    return Replacement(function, found.name, calls, dispatch=dispatch, observe=observe)


def _run(
    dispatch: Dispatch, calls: Calls, experts: Experts, tokens: Tensor, indices: Tensor, weights: Tensor
) -> Tensor | Unserved:
    result = route(dispatch, calls, tokens, indices, weights, experts)
    if isinstance(result, str):
        return Unserved(result)
    if experts.sentinels:  # identity experts behind the others
        others = weights.masked_fill(indices < experts.down.groups, 0.0)
        result = result + (tokens * others.sum(-1, keepdim=True)).to(tokens.dtype)
    return result


@dataclass(frozen=True)
class _FeedForward:
    reading: SwiGLUReading
    activations: Activations


def _why_no_plain_linear(layer: torch.nn.Module) -> str | None:
    if type(layer) is not torch.nn.Linear:
        return f"an expert's layer is a {type(layer).__module__.split('.')[0]} {type(layer).__name__}"
    if layer.bias is not None:
        return "an expert's layer has a bias"
    return "an expert's weight is sharded" if hasattr(layer.weight, "ds_id") else None


class FeedForwards:
    """The experts in a block's ModuleList: one class of plain feed-forward layers, then perhaps identities."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[type, _FeedForward | NotRead] = weakref.WeakKeyDictionary()

    def of(self, block: torch.nn.Module) -> Experts | NotRead:
        """Those of this block, or why they cannot be taken together. Looks at each one: wrappers and hooks come and
        go."""
        own, identities = self._split(block)
        if not own or any(type(each) is not torch.nn.Identity for each in identities):
            return NotRead("its experts are not of one class")
        for each in (block.experts, *identities):
            heard = listener(each, "its experts")
            if heard is not None:
                return NotRead(heard)
        found = self._feed_forward(type(own[0]))
        if isinstance(found, NotRead):
            return found
        reading, activations = found.reading, found.activations
        names = [name for name in (reading.gate, reading.up, reading.down) if name is not None]
        for expert in own:
            heard = listener(expert, "an expert") or listener_among(expert)
            if heard is not None:
                return NotRead(heard)
            if type(activations.of(expert)) is not type(activations.of(own[0])):
                return NotRead("its experts' activations are of several classes")
            for name in names:
                reason = _why_no_plain_linear(getattr(expert, name))
                if reason is not None:
                    return NotRead(reason)

        def gate(gate_up: Tensor) -> Tensor:
            first, second = gate_up.chunk(2, -1)
            return activations.of(own[0])(first) * second

        *ups, down = [Weights(tuple(getattr(expert, name).weight for expert in own), transposed=True) for name in names]
        is_silu = activations.is_silu(activations.of(own[0]))
        return Experts(tuple(ups), down, None if is_silu else gate, sentinels=bool(identities))

    def if_plain(self, block: Any) -> Experts | None:
        is_list = isinstance(getattr(block, "experts", None), torch.nn.ModuleList) and len(block.experts) > 0
        found = self.of(block) if is_list else None
        return None if isinstance(found, NotRead) else found

    def observe(self, block: torch.nn.Module) -> None:
        for expert in self._split(block)[0]:
            found = self._feed_forward(type(expert))
            if isinstance(found, _FeedForward):
                found.activations.is_silu(found.activations.of(expert))

    def _split(self, block: Any) -> tuple[list[torch.nn.Module], list[torch.nn.Module]]:
        every = list(block.experts)
        count = next((i for i, each in enumerate(every) if type(each) is not type(every[0])), len(every))
        return every[:count], every[count:]

    def _feed_forward(self, cls: type[torch.nn.Module]) -> _FeedForward | NotRead:
        found = self._known.get(cls)
        if found is None:
            reading = read_swiglu(cls, innermost(cls.forward))
            if isinstance(reading, NotRead):
                found = NotRead(f"its experts are no gated feed-forward layers: {reading.reason}")
            else:
                found = _FeedForward(reading, Activations(reading.activation))
            self._known[cls] = found
        return found
