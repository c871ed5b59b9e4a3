"""W8A8: models that transformers loaded through compressed-tensors, whose layers hold int8 weights until the first
forward decompresses them all.

Changes    the class of each such layer, which is `W8A8Linear` then: the same parameters under the same names. Its own
           forward, which rounds inputs and cuts their gradient, and the model's trigger of decompression are taken
           away.
Not when   it is decompressed already; any layer has another scheme than int8 by output channel with inputs quantised by
           token, both symmetric; its weights are on another device: decompression knows only whole models.
Delete     when transformers computes such models in int8, with a gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.nn import Linear, Module, Parameter

from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.preparation import Change, Preparation
from npu_patch.serving.implementation import FLOAT_DTYPES
from npu_patch.switches import Switches

SCHEME, STATUS, ENABLED, TRIGGER = (
    "quantization_scheme",
    "quantization_status",
    "quantization_enabled",
    "ct_decompress_hook",
)
SYMMETRIC = {"num_bits": 8, "type": "int", "symmetric": True}
OF_WEIGHTS = {**SYMMETRIC, "strategy": "channel", "dynamic": False}
OF_INPUTS = {**SYMMETRIC, "strategy": "token", "dynamic": True}
FORWARD, HOOKED = "forward", "_old_forward"  # where accelerate's hooks keep it


def concerns(model: Module) -> bool:
    return any(SCHEME in vars(layer) for layer in model.modules())


def why_not(model: Module, device_type: str, switches: Switches) -> str | None:
    layers = list(_layers(model))
    reasons = Counter(filter(None, (_why_left(layer, device_type) for layer in layers)))
    if reasons:
        said = ", ".join(f"{count} {why}" for why, count in reasons.most_common())
        return f"of its {len(layers)} quantised layers {said}"
    covered = {id(layer) for owner in _triggered(model) for layer in owner.modules()}
    if not all(id(layer) in covered for layer in layers):
        return "a part of a model whose first forward decompresses it: apply() takes the whole model"
    return None


def prepare(model: Module, device_type: str, switches: Switches) -> Iterator[Change]:
    for owner in _triggered(model):
        yield getattr(owner, TRIGGER), _without(getattr(owner, TRIGGER))
    for layer in _layers(model):
        yield layer, _in_int8(layer)


def _layers(model: Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if SCHEME in vars(layer))


def _triggered(model: Module) -> Iterator[Module]:
    """Modules whose next forward decompresses all within them."""
    for module in model.modules():
        handle = vars(module).get(TRIGGER)
        if handle is not None and handle.id in (handle.hooks_dict_ref() or ()):
            yield module


def _why_left(layer: Any, device_type: str) -> str | None:
    own = vars(layer)
    status = own.get(STATUS)
    if status != "compressed":
        done = status == "decompressed"
        return "are decompressed already: apply() comes before the first forward" if done else f"are {status}"
    scheme = own[SCHEME]
    different = _difference("weights", scheme.weights, OF_WEIGHTS) or _difference(
        "inputs", scheme.input_activations, OF_INPUTS
    )
    if different is not None or scheme.output_activations is not None:
        return f"have another scheme: {different or 'outputs are quantised'}"
    if type(layer) is not Linear or layer._modules:
        return f"are a {type(layer).__name__}" + (" with parts" if layer._modules else "")
    if own.get(ENABLED, True) is not True:
        return "are switched off"
    tensors = {**layer._parameters, **layer._buffers}
    weight, scale = tensors.pop("weight", None), tensors.pop("weight_scale", None)
    tensors.pop("bias", None)
    if tensors:
        return f"have {', '.join(tensors)}"
    if type(weight) is not Parameter or weight.dtype != torch.int8 or weight.dim() != 2:
        return "have no int8 matrix"
    if type(scale) is not Parameter or scale.shape != (len(weight), 1) or scale.dtype not in FLOAT_DTYPES:
        return "have other scales than one a row"
    if weight.device.type != device_type:
        return f"are on {weight.device.type}"
    return None


def _difference(what: str, arguments: Any, wanted: Mapping[str, Any]) -> str | None:
    for name, value in wanted.items():
        found = getattr(arguments, name, None)
        if found != value:
            return f"{what} with {name} {found}"
    return None


def _without(handle: Any) -> Any:
    """Takes a hook away; what puts it back in its place."""
    hooks = handle.hooks_dict_ref()
    at, hook = list(hooks).index(handle.id), hooks.pop(handle.id)

    def put_back(handle: Any) -> None:
        hooks = handle.hooks_dict_ref()
        if hooks is not None:
            others = list(hooks.items())
            hooks.clear()
            hooks.update([*others[:at], (handle.id, hook), *others[at:]])

    return put_back


def _in_int8(layer: Any) -> Any:
    own = vars(layer)
    name = HOOKED if "_hf_hook" in own and HOOKED in own else FORWARD
    forward = own.pop(name).__func__
    layer.__class__ = W8A8Linear
    if name == HOOKED:
        own[name] = MethodType(W8A8Linear.forward, layer)
    return partial(_as_it_was, forward)


def _as_it_was(forward: Any, layer: Any) -> None:
    own = vars(layer)
    layer.__class__ = Linear
    own[HOOKED if HOOKED in own else FORWARD] = MethodType(forward, layer)


PREPARATION = Preparation("w8a8", "w8a8", why_not, prepare, concerns, first=True)
