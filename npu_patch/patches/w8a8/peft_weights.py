"""What peft reads and writes of a weight, where that is int8.

Rebinds    `_check_merge_allowed`, which every tuner asks before it merges; `merge` of linear layers with LoRA;
           `dequantize_module_weight` wherever peft imported it, which DoRA asks for a layer's weight; `_activate_lora`
           of adapters for packed experts; `inject_adapter`, by which every tuner puts adapters on layers.
To         an error before anything is merged (peft would add `delta.to(int8)`, which is nothing, or fail half-way);
           the weight times its scales; adapters that our experts compute (peft would round them to int8, where they
           are nothing and get no gradient); an error for tuners that are not known to leave weights to their layers
           (tuners.py). Where their adapters are there already, the report says so.
Not when   no layer with an adapter is one of int8 weights.
Delete     when peft knows layers of int8 weights with scales.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch.nn import Module

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.adapted_experts import ExpertsAdapter
from npu_patch.ops.w8a8.dequantised import dequantised
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.op import W8A8
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.patches.w8a8.experts import ADAPTERS
from npu_patch.patches.w8a8.tuners import why_not, why_not_on
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import Site

ASKED, MERGE, WEIGHT_OF, ACTIVATE = "_check_merge_allowed", "merge", "dequantize_module_weight", "_activate_lora"
INJECT = "inject_adapter"
LAYERS = ("Linear", "ParamWrapper")
INSTEAD = (
    "`python -m npu_patch dequantize MODEL OUT` makes a copy of the checkpoint without int8: load the adapter beside "
    "that, and merge there"
)


def find(module: ModuleType) -> Iterable[Site]:
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            if value.__name__ == "BaseTuner":
                yield from (Site(value, name, vars(value)[name]) for name in (ASKED, INJECT) if name in vars(value))
            if value.__name__ in LAYERS and "lora_A" in _names(value):
                yield from (Site(value, name, vars(value)[name]) for name in (MERGE, ACTIVATE) if name in vars(value))
    if WEIGHT_OF in vars(module):
        yield Site(module, WEIGHT_OF, vars(module)[WEIGHT_OF])


def _names(cls: type) -> tuple[str, ...]:
    return tuple(getattr(cls, "adapter_layer_names", ()))


def in_layer(layer: Module) -> Iterable[Site]:
    """Adapters that are on int8 weights and read them."""
    if type(layer._modules.get("base_layer")) is W8A8Linear and why_not_on(layer) is not None:
        yield Site(layer, "forward", None, f"{type(layer).__module__}.{type(layer).__qualname__}")


def read_site(site: Site) -> AsNamed | NotRead:
    """Whatever it does: it does that still, with other layers."""
    if isinstance(site.owner, Module):
        return NotRead(f"what it computes on int8 weights is wrong: {why_not_on(site.owner)}")
    return AsNamed("int8 weights")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    if context.live is not None and not any(map(_has_int8, context.live)):
        return NotRead("no layer of the model is of int8 weights", notable=False)
    calls = Calls()

    def check(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse([name for name, each in self.model.named_modules() if _is_int8(each)])
        return TakenOver(site.original(self, *args, **kwargs))

    def merge(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse([type(self).__name__] if _is_int8(self) else [])
        return TakenOver(site.original(self, *args, **kwargs))

    def weight_of(module: Any, *args: Any, **kwargs: Any) -> Any:
        if type(module) is not W8A8Linear:
            return Unserved("another layer")
        return dequantised(module.weight, module.weight_scale)

    def activate(self: Any, active_adapters: Any) -> Any:
        if not _is_int8(self):
            return TakenOver(site.original(self, active_adapters))
        return _adapting(self, [name for name in active_adapters if name in self.lora_A])

    def inject(self: Any, model: Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        why = why_not(type(self), self.peft_config.get(adapter_name))
        int8 = next((name for name, each in model.named_modules() if type(each) is W8A8Linear), None)
        if why is not None and int8 is not None:
            raise ValueError(f"the model has int8 weights ({int8}): {why}")
        return TakenOver(site.original(self, model, adapter_name, *args, **kwargs))

    ways: dict[str, Callable[..., Any]] = {
        INJECT: inject,
        ASKED: check,
        MERGE: merge,
        WEIGHT_OF: weight_of,
        ACTIVATE: activate,
    }
    function = replacement_for(site.original, calls, ways[site.name], bypassed=Bypassed())
    return Replacement(function, reading.name, calls, alone=False, within=None)


def _is_int8(adapted: Module) -> bool:
    """Whether it is a layer of peft's around one of int8 weights, or around int8 experts."""
    named = getattr(adapted, "parameter_name", None)
    if named is None or "lora_A" not in adapted._modules:
        return type(adapted._modules.get("base_layer")) is W8A8Linear
    base: Any = adapted.get_base_layer()  # type: ignore[operator]
    return base._parameters.get(named) is not None and base._parameters[named].dtype == torch.int8


@contextlib.contextmanager
def _adapting(wrapper: Any, names: Sequence[str]) -> Iterator[None]:
    """The experts within find the adapters of these names."""
    held = vars(wrapper.get_base_layer())
    held.setdefault(ADAPTERS, {})[wrapper.parameter_name] = [_adapter(wrapper, name) for name in names]
    try:
        yield
    finally:
        del held[ADAPTERS][wrapper.parameter_name]
        if not held[ADAPTERS]:
            del held[ADAPTERS]


def _adapter(wrapper: Any, name: str) -> ExpertsAdapter:
    """In the order that peft keeps them: A by expert and rank, B by rank and expert."""
    down, up = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    experts = wrapper.num_experts
    return ExpertsAdapter(
        down.reshape(experts, -1, down.shape[1]),
        up.reshape(up.shape[0], -1, experts).permute(2, 0, 1),
        float(wrapper.scaling[name]),
    )


def _has_int8(layer: Module) -> bool:
    return type(layer) is W8A8Linear or any(
        each.dtype == torch.int8 for each in layer._parameters.values() if each is not None
    )


def _refuse(names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"adapters cannot be merged into the int8 weights of {names[0]}{more}; {INSTEAD}")


PATCH = Patch(
    "w8a8_peft",
    "w8a8",
    W8A8,
    find,
    read_site,
    bind_site,
    in_layer=in_layer,
    layers=lambda site, context: None,
    tunable=False,
    libraries=("peft",),
    around=True,
)
