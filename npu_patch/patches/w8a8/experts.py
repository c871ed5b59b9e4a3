"""Experts in int8, which transformers' experts registry finds under a name of ours: loading registers it, and a model
that has such experts asks for it in its configuration.

Rebinds    `computed` of this module, which what is registered looks up at call time: plain torch, on every device.
To         `npu_dynamic_quant` of the tokens before they are copied to their experts -> `npu_grouped_matmul` to int32
           -> `npu_dequant_swiglu_quant` -> `npu_grouped_matmul` -> `npu_moe_token_unpermute`. Where the fused operator
           does not take the width, and for another gate, the first product is scaled and the gate's result quantised.
           Adapters of peft's for these weights (peft_weights.py) are grouped products of their own.
Not when   tokens are in float32 or on another device, somebody listens to the activation, and the operators' limits.
Delete     when transformers has int8 experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import TORCH_PRODUCTS
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.adapted_experts import ADAPTED, Adapters, adapted_experts
from npu_patch.ops.w8a8.experts import REGISTERED, TORCH, Int8Experts, Int8Weights, int8_experts
from npu_patch.ops.w8a8.experts_op import INT8_EXPERTS, case
from npu_patch.patches.experts.packed import listener_in
from npu_patch.patches.experts.patch import ARGUMENTS, READINGS, asked_for, registry
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.experts import ExpertsReading, gate_of
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.replacement import Unserved, replacement_for, tensors_on
from npu_patch.sites.sites import LiveModules, Site

COMPUTED = "computed"
FLOATS = "grouped_mm"  # transformers' own, for layers of the model that are not int8
DOWN, SCALE = "down_proj", "_scale"
ADAPTERS = "_npu_patch_adapters"  # in a layer's namespace, by the weight that they are for
NAMED = AsNamed("int8 experts")


def register() -> None:
    """Once, and for good: what is loaded keeps computing, whatever is restored.

    Raises:
        ImportError: this transformers has no experts registry.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(REGISTERED, forward)


def forward(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What is registered. The layers of a model that are not int8 go on as they would."""
    if "parametrizations" in self._modules:
        raise RuntimeError(
            f"something is put in the place of a weight of {type(self).__name__}, whose experts are int8; adapters of "
            "peft's are computed while npu_patch is applied with w8a8: call npu_patch.apply()"
        )
    if _is_int8(self):
        return computed(self, hidden_states, top_k_index, top_k_weights)
    entries = registry()
    assert entries is not None
    result: Tensor = entries[FLOATS](self, hidden_states, top_k_index, top_k_weights)
    return result


def computed(self: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    call = in_autocast(hidden_states), top_k_index, top_k_weights, experts_of(self)
    adapters = adapters_of(self)
    result = (
        int8_experts(TORCH, *call) if adapters is None else adapted_experts(TORCH, TORCH_PRODUCTS, *call, *adapters)
    )
    return result.to(hidden_states.dtype)


def adapters_of(layer: torch.nn.Module) -> tuple[Adapters, Adapters] | None:
    """Of the weights before and after the gate, in a call of peft's around them."""
    own = vars(layer).get(ADAPTERS)
    if not own:
        return None
    reading = READINGS.of(layer)
    assert not isinstance(reading, NotRead)
    up, down = names_of(reading)
    return own.get(up, ()), own.get(down, ())


def in_autocast(tokens: Tensor) -> Tensor:
    device_type = tokens.device.type
    return tokens.to(torch.get_autocast_dtype(device_type)) if torch.is_autocast_enabled(device_type) else tokens


def experts_of(layer: torch.nn.Module) -> Int8Experts:
    """The layer's at this call.

    Raises:
        NotImplementedError: it computes what int8 experts do not; loading such a layer is an error already.
    """
    reading = READINGS.of(layer)
    if isinstance(reading, NotRead):
        raise NotImplementedError(f"int8 experts of {type(layer).__name__}: {reading.reason}")
    why = why_not(layer, reading)
    if why is not None:
        raise NotImplementedError(f"int8 experts of {type(layer).__name__}: {why}")
    up, down = (_weights(layer, name, reading.convention.transposed) for name in names_of(reading))
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


def _is_int8(layer: torch.nn.Module) -> bool:
    return getattr(getattr(layer, DOWN), "dtype", None) == torch.int8


def registered() -> Iterable[Site]:
    if registry() is not None:
        module = sys.modules[__name__]
        yield Site(module, COMPUTED, vars(module)[COMPUTED], f"ExpertsInterface[{REGISTERED!r}]")


def find(module: ModuleType) -> Iterable[Site]:
    return ()


def read_site(site: Site) -> AsNamed:
    return NAMED


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    if context.live is not None and not any(_live(context.live)):
        return NotRead("no experts in int8", notable=False)
    calls = Calls()
    dispatch = context.dispatch(_checks)

    def serve(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        bound = tensors_on(context.device_type, ARGUMENTS, args, kwargs)
        if isinstance(bound, Unserved):
            return bound
        heard = listener_in(self)
        if heard is not None:
            return Unserved(heard)
        hidden_states, indices, router_weights = bound
        call = in_autocast(hidden_states), indices, router_weights, experts_of(self)
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            return Unserved(serving)
        adapters = adapters_of(self)
        result = serving.run(*call) if adapters is None else ADAPTED[serving.name](*call, *adapters)
        return result.to(hidden_states.dtype)

    function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
    return Replacement(function, reading.name, calls, dispatch=dispatch, within=None)


def _live(model: LiveModules) -> Iterator[torch.nn.Module]:
    return (each for each in model if asked_for(each) == REGISTERED and hasattr(each, DOWN) and _is_int8(each))


def _checks(model: LiveModules) -> Iterator[Case]:
    if model.dtype is not None:
        for layer in _live(model):
            yield case(experts_of(layer), model.dtype)


PATCH = Patch(
    "w8a8_experts",
    "w8a8",
    INT8_EXPERTS,
    find,
    read_site,
    bind_site,
    registered,
    layers=lambda site, context: None if context.live is None else sum(1 for _ in _live(context.live)),
    tunable=False,
)
