"""LoRA: peft's layers of one `nn.Linear` and one active adapter, `base(x) + B(A(drop(x))) s`.

Rebinds    `forward` of peft's class, whose instances are made before `apply()` or after it.
To         one function of the weights, which keeps x once and nothing of its size beside (ops/lora/).
Not when   several adapters are active, or none; examples of a batch have adapters of their own (`adapter_names`);
           adapters are disabled, merged, of a variant (DoRA and the like) or have a bias; the layer is neither a plain
           `nn.Linear` nor one of int8 weights that patches/w8a8/ serves; anybody listens to one of its parts. peft's
           forward then runs.
Delete     when peft has such a function.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Dropout, Identity, Linear, Module

from npu_patch.ops.lora.adapted_linear import Adapter
from npu_patch.ops.lora.op import ADAPTED_LINEAR, TOGETHER, case, int8_case
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.layer import W8A8Linear, computes_in
from npu_patch.ops.w8a8.shared_rows import shared_rows
from npu_patch.patches.lora.groups import Groups
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.probe.adapted_linear import read_adapted_linear
from npu_patch.serving.bypassed import LINEAR, MODULE_CALL, Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Case
from npu_patch.serving.changed_later import Callers
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.implementation import Implementation
from npu_patch.serving.listeners import first_listener
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.sites import LiveModules, Site, rebindable_forwards
from npu_patch.sites.whose import is_ours
from npu_patch.waiting.contract import Waiting
from npu_patch.waiting.head_call import is_put_off

OF_INT8 = W8A8Linear.forward
OF_LINEAR, OF_DROPOUT, OF_IDENTITY = Linear.forward, Dropout.forward, Identity.forward  # whoever binds them anew
DROPOUT = (F, "dropout")
Call = tuple[Tensor, Tensor, "Tensor | None", Adapter]


@dataclass(frozen=True)
class Another:
    """What a class is that has adapters, in the place of a linear layer with adapters."""

    reason: str
    linear: bool


def find(module: ModuleType) -> Iterable[Site]:
    """Layers that say to have such adapters."""
    return (each for each in rebindable_forwards(module) if "lora_A" in getattr(each.owner, "adapter_layer_names", ()))


def read_site(site: Site) -> AsNamed | Another:
    """Those of other layers than linear ones need not be looked at."""
    if "linear" not in site.owner.__name__.lower():
        return Another("an adapter of no linear layer", linear=False)
    found = read_adapted_linear(site.owner, site.original)
    return Another(found.reason, linear=True) if isinstance(found, NotRead) else found


def bind_site(site: Site, found: AsNamed | Another, context: Context) -> Replacement | NotRead:
    cls, original = site.owner, site.original
    if isinstance(found, Another):  # peft has many kinds: the report has those of the given model
        return NotRead(found.reason, notable=bool(context.live_modules(cls)), in_order=not found.linear)
    calls, callers, groups, device_type = Calls(), Callers(), Groups(cls), context.device_type
    dispatch = context.dispatch(lambda live: _cases(cls, live))

    def serve(self: Module, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        if torch.compiler.is_compiling():
            return Unserved("compiling: the compiler fuses what it is given")
        if kwargs or len(args) != 1:
            return Unserved("arguments beside the input")
        (x,) = args
        if not isinstance(x, Tensor) or x.device.type != device_type:
            return Unserved(f"input on {x.device.type}" if isinstance(x, Tensor) else "an input that is no tensor")
        if type(self) is not cls:
            reading = read_adapted_linear(type(self), original)
            if isinstance(reading, NotRead):
                return Unserved(reading.reason)
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return Unserved("within a transform of torch.func")
        cast_to = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        call = _call_of(self, x, cast_to)
        if isinstance(call, str):
            return Unserved(call)
        if isinstance(x, Waiting):
            x = x.materialise("an adapter")
            call = x, *call[1:]
        ready = groups.ready(self, call)
        if ready is not None:
            return ready
        serving = dispatch.serving(calls, *call)
        if isinstance(serving, str):
            return Unserved(serving)
        if _is_copied_by_the_original(*call):
            changed = callers.why_changed_later(self, (x,))
            if changed is not None:
                calls.declined["the input itself"] = f"a copy is kept: {changed}"
                return serving.run(x.clone(), *call[1:])
        together = TOGETHER.get(serving.name)
        others = {} if together is None else dict(_with_it(groups, self, call, cast_to, dispatch, calls, serving))
        if together is None or not others:
            return serving.run(*call)
        result, *results = together(x, [each[1:] for each in (call, *others.values())])
        groups.wait(self, others, results)
        return result

    function = replacement_for(original, calls, serve, bypassed=Bypassed.by(original, LINEAR, DROPOUT, MODULE_CALL))
    return Replacement(function, found.name, calls, dispatch=dispatch, within=None)


def _with_it(
    groups: Groups, layer: Module, call: Call, cast_to: Any, dispatch: Dispatch, calls: Calls, serving: Implementation
) -> Iterator[tuple[Module, Call]]:
    """The layers whose calls are computed with this one's, and those calls."""
    dtypes = call[3].settings[2:]
    for other in groups.after(layer):
        if "forward" in other.__dict__ or other._forward_pre_hooks:
            continue
        its_call = _call_of(other, call[0], cast_to)
        if isinstance(its_call, str) or its_call[3].settings[2:] != dtypes:
            continue
        if dispatch.serving(calls, *its_call) is serving:
            yield other, its_call


def _call_of(layer: Any, x: Tensor, cast_to: torch.dtype | None) -> Call | str:
    """What computes this call of a layer, or why only its own forward can. `cast_to`: autocast's dtype, if it is on."""
    if layer.disable_adapters:
        return "adapters are disabled"
    if layer.merged:
        return "its adapter is merged"
    parts = layer._modules
    down_of, up_of = parts["lora_A"]._modules, parts["lora_B"]._modules
    names = [name for name in layer.active_adapters if name in down_of]
    if len(names) != 1:
        return "several active adapters" if names else "no active adapter"
    (name,) = names
    if name in getattr(layer, "lora_variant", ()) or getattr(layer, "use_dora", {}).get(name):
        return "a variant of LoRA"
    base, down, up, dropout = parts["base_layer"], down_of[name], up_of[name], parts["lora_dropout"]._modules[name]
    scale = _scale_of(base)
    for part, its_name in ((base, "base_layer"), (down, "lora_A"), (up, "lora_B")):
        if type(part).forward is not OF_LINEAR and (part is not base or scale is None):
            return f"{its_name} is a {type(part).__name__}"
    heard = first_listener(((base, "base_layer"), (down, "lora_A"), (up, "lora_B"), (dropout, "lora_dropout")))
    if heard is not None:
        return "its product waits for the loss" if is_put_off(base) else heard
    probability = _probability(dropout)
    if isinstance(probability, str):
        return probability
    scaling = layer.scaling[name]
    if type(scaling) not in (float, int):
        return f"a scaling that is a {type(scaling).__name__}"
    (weight, bias), (down_weight, down_bias), (up_weight, up_bias) = (
        _parameters(base),
        _parameters(down),
        _parameters(up),
    )
    if down_bias is not None or up_bias is not None:
        return "an adapter with a bias"
    dtype, compute = x.dtype, down_weight.dtype
    product = weight.dtype if scale is None else dtype
    if dtype is not compute and not getattr(layer, "cast_input_dtype_enabled", True):
        return "casting its input is switched off"
    if cast_to is not None:
        product = compute = cast_to
    elif dtype is not product or up_weight.dtype is not compute or (bias is not None and bias.dtype is not product):
        return f"input, weight and adapter in {dtype}, {product}, {compute} and {up_weight.dtype}"
    adapter = Adapter(down_weight, up_weight, float(scaling), probability, product, compute, scale)
    return x, weight, bias, adapter if scale is None else adapter._replace(rows=partial(shared_rows, base, False))


def _scale_of(base: Any) -> Any:
    """Of a layer of int8 weights, where our function serves it."""
    if type(base) is not W8A8Linear or W8A8Linear.forward is OF_INT8 or not is_ours(W8A8Linear.forward):
        return None
    return base._parameters["weight_scale"]


def _parameters(linear: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias. Asking the module itself leads through its `__getattr__`."""
    own = linear.__dict__["_parameters"]
    if "weight" in own and "bias" in own:
        return own["weight"], own["bias"]
    return linear.weight, linear.bias  # whoever shards it keeps them elsewhere


def _probability(dropout: Any) -> float | str:
    """Of dropping an element now."""
    of_class = type(dropout).forward
    if of_class is OF_IDENTITY:
        return 0.0
    if of_class is not OF_DROPOUT:
        return f"lora_dropout is a {type(dropout).__name__}"
    if not dropout.training:
        return 0.0
    p = dropout.p
    if dropout.inplace or type(p) not in (float, int) or not 0 <= p < 1:
        return f"dropout {'in place' if dropout.inplace else f'of {p!r}'}"
    return float(p)


def _is_copied_by_the_original(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> bool:
    """Whether it keeps a copy of x for its backward: another dtype, or what dropout left. We keep x."""
    if not torch.is_grad_enabled() or not adapter.down.requires_grad or weight.requires_grad:
        return False
    return adapter.dropout > 0 or x.dtype != adapter.compute


def _cases(cls: type, live: LiveModules) -> Iterator[Case]:
    """Of the layers' adapters, in the dtypes that they have and under autocast to half precision."""
    layers: Iterable[Any] = live.of(cls)
    for layer in layers:
        base = layer._modules["base_layer"]
        of_kind = {Linear: case, W8A8Linear: int8_case}.get(type(base))
        if of_kind is None:
            continue
        dtype = base.weight.dtype if type(base) is Linear else computes_in(base, live.dtype)
        for down in layer._modules["lora_A"]._modules.values():
            dtypes = {(dtype, down.weight.dtype), (torch.bfloat16, torch.bfloat16)}
            for product, compute in dtypes:
                yield of_kind(base.out_features, base.in_features, down.out_features, product, compute)


PATCH: Patch[AsNamed | Another, ..., Any] = Patch(
    "lora", "lora", ADAPTED_LINEAR, find, read_site, bind_site, libraries=("peft",)
)
