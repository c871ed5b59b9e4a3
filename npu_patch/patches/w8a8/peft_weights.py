"""What peft reads and writes of a weight, where that is int8.

Rebinds    `_check_merge_allowed`, which every tuner asks before it merges; `merge` of linear layers with LoRA;
           `dequantize_module_weight` wherever peft imported it, which DoRA asks for a layer's weight.
To         an error before anything is merged (peft would add `delta.to(int8)`, which is nothing, or fail half-way);
           the weight times its scales.
Not when   no layer with an adapter is one of int8 weights.
Delete     when peft knows layers of int8 weights with scales.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import Any

from torch.nn import Module

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.w8a8.dequantised import dequantised
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.op import W8A8
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, Unserved, replacement_for
from npu_patch.sites.sites import Site

ASKED, MERGE, WEIGHT_OF = "_check_merge_allowed", "merge", "dequantize_module_weight"
INSTEAD = (
    "`python -m npu_patch dequantize MODEL OUT` makes a copy of the checkpoint without int8: load the adapter beside "
    "that, and merge there"
)


def find(module: ModuleType) -> Iterable[Site]:
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            if value.__name__ == "BaseTuner" and ASKED in vars(value):
                yield Site(value, ASKED, vars(value)[ASKED])
            if value.__name__ == "Linear" and MERGE in vars(value) and "lora_A" in _names(value):
                yield Site(value, MERGE, vars(value)[MERGE])
    if WEIGHT_OF in vars(module):
        yield Site(module, WEIGHT_OF, vars(module)[WEIGHT_OF])


def _names(cls: type) -> tuple[str, ...]:
    return tuple(getattr(cls, "adapter_layer_names", ()))


def read_site(site: Site) -> AsNamed:
    """Whatever it does: it does that still, with other layers."""
    return AsNamed("int8 weights")


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement | NotRead:
    if context.live is not None and not context.live_modules(W8A8Linear):
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

    serve = {ASKED: check, MERGE: merge, WEIGHT_OF: weight_of}[site.name]
    function = replacement_for(site.original, calls, serve, bypassed=Bypassed())
    return Replacement(function, reading.name, calls, alone=False, within=None)


def _is_int8(adapted: Module) -> bool:
    """Whether it is a layer of peft's around one of int8 weights."""
    return type(adapted._modules.get("base_layer")) is W8A8Linear


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
    layers=lambda site, context: None,
    tunable=False,
    libraries=("peft",),
    around=True,
)
