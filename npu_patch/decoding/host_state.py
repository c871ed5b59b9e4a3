"""What the host knows of a model: all that a captured step has frozen, and that a later call may find changed.

Where weights are, which adapters are active and how they are scaled, modes, configurations, what stands at the names of
its classes and files. Values on the device are not looked at: a graph reads those at each replay.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules import module as of_all
from torch.utils.hooks import RemovableHandle

from npu_patch.decoding.gradient_hooks import only_asks_for_gradients
from npu_patch.numerics.serial import serial
from npu_patch.sites import journal

OF_MEMORY = (Tensor, torch.nn.Parameter, torch.nn.Buffer)
NO_STATE = (torch.nn.Module, type, ModuleType, FunctionType, MethodType)
PLAIN = (int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device)
# What modules keep beside their state: looked at by themselves, of no concern to a step, or of generate() itself.
APART = frozenset(
    {"_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_compiled_call_impl"}
    | {"_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook", "_non_persistent_buffers_set"}
    | {"_previous_max_cache_length", "generation_config"}
)
DEEPEST = 4
DEEPEST_OBJECTS = 2
# Whose functions at a layer's `forward` do nothing beside computing: casts of accelerate and trl, npu_patch's own.
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "trl", "npu_patch", "functools", "contextlib")
SMALL = 1 << 16  # numbers of a tensor that may be kept for the sake of its address
HOOKS = "hooks on modules of the model"
# transformers leaves its hooks in place once outputs were asked for; they do nothing in a call that asks for none.
SILENT = "transformers.utils.output_capturing"


@dataclass(frozen=True)
class Observed:
    """`state` is equal for two looks between which nothing changed. `why_not`: what no graph may stand for.
    `dtypes`: of the parameters, on which those of a cache depend. `loose`: tensors that modules keep beside parameters
    and buffers, in the order of `state`. They may be a caller's: nothing is written there."""

    state: tuple[Any, ...]
    why_not: str | None
    dtypes: int
    loose: tuple[Tensor, ...]

    def changes_to(self, later: Observed) -> bool:
        """Whether what lies between them, one step, changed anything but values of parameters and buffers."""
        same = all(one is other for one, other in zip(self.loose, later.loose, strict=False))
        return not same or self.state != later.state or self.written != later.written

    @property
    def written(self) -> list[int]:
        return [0 if tensor.is_inference() else tensor._version for tensor in self.loose]


def observe(model: torch.nn.Module, device_type: str, of_no_concern: tuple[str, ...] = ()) -> Observed:
    """Walks over all modules: for once per call of generate(), not per token. `of_no_concern`: attributes."""
    of_all_modules = (*of_all._global_forward_hooks.values(), *of_all._global_forward_pre_hooks.values())
    state: list[Any] = [journal.changes(), tuple(map(serial, of_all_modules))]
    loose: list[Tensor] = []
    dtypes: list[torch.dtype] = []
    classes: dict[type[torch.nn.Module], None] = {}
    configurations: dict[int, Any] = {}
    why_not = "hooks on all modules" if of_all_modules else None
    for module in model.modules():
        own = vars(module)
        listeners = _listeners(own)
        why_not = why_not or (HOOKS if listeners else None) or _of_another_engine(own) or _wrapped(own)
        classes.setdefault(type(module))
        state.append((serial(module), tuple(own["_modules"]), tuple(map(serial, listeners))))
        for name, tensor in (*own["_parameters"].items(), *own["_buffers"].items()):
            if tensor is not None:
                why_not = why_not or _not_there(tensor, device_type)
                state.append((name, *_place(tensor)))
        dtypes += [tensor.dtype for tensor in own["_parameters"].values() if tensor is not None]
        for name, value in own.items():
            if name == "config":
                configurations.setdefault(id(value), value)
            elif isinstance(value, Tensor) and value.device.type == device_type and value.numel() <= SMALL:
                loose.append(value)
                state.append((name, *_place(value)))
            elif name not in APART and name not in of_no_concern:
                state.append((name, _value(value, 0)))
    state += [_value(vars(each), 0) for each in configurations.values() if hasattr(each, "__dict__")]
    state += [(serial(cls), serial(cls.forward)) for cls in classes]
    files = {cls.__module__ for cls in classes if not cls.__module__.startswith("torch.")}
    state += [tuple(map(serial, vars(sys.modules[name]).values())) for name in sorted(files) if name in sys.modules]
    return Observed(tuple(state), why_not, hash(tuple(dtypes)), tuple(loose))


def _listeners(own: dict[str, Any]) -> list[Any]:
    hooks = (*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values())
    return [hook for hook in hooks if getattr(hook, "__module__", None) != SILENT and not only_asks_for_gradients(hook)]


def _wrapped(own: dict[str, Any]) -> str | None:
    """What somebody's function does beside the layer's own would not be done by a replay, as with a hook."""
    function = own.get("forward")
    while function is not None:
        code = getattr(function, "__func__", function)
        place = getattr(code, "__globals__", None)  # functools.wraps copies __module__
        whose = type(code).__module__ if place is None else str(place.get("__name__"))
        if whose.partition(".")[0] not in LIBRARIES:
            return "a layer with a forward of its own"
        function = getattr(code, "__wrapped__", None)
    return None


def _of_another_engine(own: dict[str, Any]) -> str | None:
    if "_hf_hook" in own:
        return "accelerate moves modules of the model"
    if own.get("_compiled_call_impl") is not None or "_orig_mod" in own["_modules"]:
        return "a part of the model is compiled"
    forward = own.get("forward")
    if forward is not None and hasattr(forward, "_torchdynamo_orig_callable"):
        return "a part of the model is compiled"
    return None


def _not_there(tensor: Tensor, device_type: str) -> str | None:
    if type(tensor) not in OF_MEMORY:  # isinstance() takes a DTensor for a Parameter
        return f"weights that are a {type(tensor).__name__}"
    if tensor.device.type != device_type:
        return f"weights on {tensor.device.type}"
    return None


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Of a subclass (a part of a tensor on several devices, say), which one it is: it may have no memory of its own."""
    own_memory = tensor.device.type != "meta" and type(tensor) in OF_MEMORY
    address = tensor.data_ptr() if own_memory else serial(tensor)
    return address, tensor.dtype, tensor.device, tensor.shape, tensor.stride()


def _value(value: Any, depth: int) -> Any:
    """Something that compares equal as long as the value means the same to a step."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        return _place(value)
    if isinstance(value, RemovableHandle):  # of a hook, which is looked at itself
        return None
    if depth < DEEPEST:
        if isinstance(value, functools.partial):  # made anew each time that checkpointing is turned on again
            return _value((value.func, value.args, value.keywords), depth + 1)
        if isinstance(value, dict):
            return tuple((key, _value(each, depth + 1)) for key, each in list(value.items()))
        if isinstance(value, (list, tuple)):
            return tuple(_value(each, depth + 1) for each in value)
        if isinstance(value, (set, frozenset)):
            return frozenset(map(serial, value)) if not all(type(each) in PLAIN for each in value) else frozenset(value)
        if hasattr(value, "to_dict") and hasattr(value, "__dict__"):  # a configuration within another
            return _value(vars(value), depth + 1)
        if depth < DEEPEST_OBJECTS and not isinstance(value, NO_STATE) and hasattr(value, "__dict__"):
            return serial(value), _value(vars(value), depth + 2)
    return serial(value)
