"""Where things can be rebound: modeling modules, their classes and functions, and live instances."""

from __future__ import annotations

import contextlib
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

from npu_patch.sites.late_imports import is_modeling_module

CELL, WRAPPED = "cell_contents", "__wrapped__"
# Classes of a model that are defined here are not modeling code: wrappers, hooks, kernels, building blocks.
FOREIGN_PACKAGES = (
    "torch",
    "torch_npu",
    "transformers",
    "peft",
    "accelerate",
    "deepspeed",
    "trl",
    "kernels",
    "builtins",
)


@dataclass(frozen=True)
class Site:
    """`name` in the namespace of `owner`, bound to `original` when it was found.

    The owner is a module, a class, a live instance or a mapping (a transformers registry); for the last two,
    `described` says in the report what it is.
    """

    owner: Any
    name: str
    original: Any
    described: str = ""

    @property
    def label(self) -> str:
        if self.described:
            return self.described
        if isinstance(self.owner, ModuleType):
            return f"{self.owner.__name__}.{self.name}"
        return f"{self.owner.__module__}.{self.owner.__qualname__}.{self.name}"


def loaded_modules(wanted: Callable[[str], bool]) -> list[ModuleType]:
    modules = [module for name, module in list(sys.modules.items()) if wanted(name)]
    return [module for module in modules if isinstance(module, ModuleType)]


def modules_of_model(model: torch.nn.Module) -> list[ModuleType]:
    """The modules that define the classes of `model`, wherever its author put them."""
    names = {cls.__module__: None for module in model.modules() for cls in type(module).__mro__}
    found = [sys.modules[name] for name in names if name in sys.modules and is_own(name)]
    return [module for module in found if isinstance(module, ModuleType)]


@dataclass(frozen=True)
class Displaced:
    """Classes of a model whose names in their module something else took since: Liger puts its own classes there, while
    layers that exist keep theirs. `module`: a copy of the namespace, in which they have their names again."""

    module: ModuleType
    classes: frozenset[type]

    def found_by(self, find: Callable[[ModuleType], Iterable[Site]]) -> Iterator[Site]:
        """The sites that these classes own; all others are found in the module itself."""
        return (site for site in find(self.module) if site.owner in self.classes)


def displaced_classes(model: torch.nn.Module) -> list[Displaced]:
    """By their modules."""
    classes: dict[str, dict[str, type]] = {}
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        named = getattr(sys.modules.get(cls.__module__), cls.__name__, cls) if is_own(cls.__module__) else cls
        if named is not cls:
            classes.setdefault(cls.__module__, {})[cls.__name__] = cls
    found = []
    for name, of_module in classes.items():
        copied = ModuleType(name)
        vars(copied).update(vars(sys.modules[name]), **of_module)
        found.append(Displaced(copied, frozenset(of_module.values())))
    return found


def is_own(name: str) -> bool:
    return is_modeling_module(name) or name.split(".", 1)[0] not in FOREIGN_PACKAGES


def forwards(module: ModuleType) -> Iterator[Site]:
    """The `forward` of each `nn.Module` class that `module` defines itself."""
    for cls in list(vars(module).values()):
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module) and cls.__module__ == module.__name__:
            forward = vars(cls).get("forward")
            if isinstance(forward, FunctionType):
                yield Site(cls, "forward", forward)


def functions(module: ModuleType) -> Iterator[Site]:
    """Each function in the namespace of `module` that comes from modeling code, as it is bound there."""
    for name, value in list(vars(module).items()):
        function = unwrapped(value)
        if function is not None and function.__module__ is not None and is_own(function.__module__):
            yield Site(module, name, value)


def unwrapped(value: Any) -> FunctionType | None:
    """The Python function behind `value`: itself, or what the `kernels` package wrapped into an `nn.Module`."""
    if isinstance(value, FunctionType):
        return value
    if isinstance(value, torch.nn.Module):
        forward = vars(type(value)).get("forward")
        cells = getattr(forward, "__closure__", None) or ()
        inner = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, FunctionType)]
        return inner[0] if len(inner) == 1 else None
    return None


def parameter_names(function: Callable[..., Any]) -> tuple[str, ...] | None:
    """The names of the parameters after `self`, or None if there is a `*args` or `**kwargs`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if any(parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters)


def rebindable_forwards(module: ModuleType) -> Iterator[Site]:
    """But for those of gradient checkpointing layers."""
    return (site for site in forwards(module) if not is_checkpointing_layer(site.owner))


def is_checkpointing_layer(cls: type) -> bool:
    """Whether assigning `cls.forward` could turn gradient checkpointing off.

    transformers 5.23 checkpoints in a wrapper that `GradientCheckpointingLayer.__init_subclass__` puts on
    `cls.forward` and that looks whether it is still the class's own.
    """
    layers = sys.modules.get("transformers.modeling_layers")
    base = getattr(layers, "GradientCheckpointingLayer", None)
    return base is not None and issubclass(cls, base)


@dataclass(frozen=True)
class BoundForward:
    """A forward on a live instance that keeps a class-level rebinding from reaching it. `owner`, `name`: where it is
    kept; `reachable`: it is the class's own, so it can be bound anew."""

    owner: Any
    name: str
    bound: Any
    reachable: bool


def bound_forward(module: torch.nn.Module, originals: Sequence[Any]) -> BoundForward | None:
    """What `module` has in place of its class's forward, if anything.

    accelerate keeps the bound forward of the time of hooking in `_old_forward`; `kernels` and others bind `forward`;
    transformers' tensor parallelism binds a function that closes over it.
    """
    namespace = vars(module)
    if "forward" not in namespace:
        return None
    name = "_old_forward" if "_hf_hook" in namespace and "_old_forward" in namespace else "forward"
    bound = namespace[name]
    own = {id(function) for original in originals for function in _with_wrapped(original)}
    if isinstance(bound, MethodType) and bound.__self__ is module and id(bound.__func__) in own:
        return BoundForward(module, name, bound, True)
    wraps = id(innermost(bound)) in own  # else a plain function of the class may be what theirs comes back to at times
    for owner, where, value in _kept_in(bound, own):
        is_method = isinstance(value, MethodType) and value.__self__ is module
        if id(value.__func__) in own if is_method else wraps and id(value) in own:
            return BoundForward(owner, where, value, True)
    return BoundForward(module, name, bound, False)


def _with_wrapped(function: Any) -> Iterator[Any]:
    """With the functions that it was made of. Not those that were made of it: what somebody wraps a forward into says
    so, too, and is theirs."""
    while function is not None:
        yield function
        function = getattr(function, WRAPPED, None)


def _kept_in(wrapper: Any, own: Iterable[int]) -> Iterator[tuple[Any, str, Any]]:
    """What a function closes over and a callable object keeps, and what those keep: wrappers around wrappers. With
    where that is. Not what the functions `own`, by their ids, close over: their decorators are theirs."""
    waiting: list[Any] = [wrapper]
    seen = set(own)
    while waiting:
        kept = waiting.pop()
        kept = kept.__func__ if isinstance(kept, MethodType) else kept
        if id(kept) in seen:
            continue
        seen.add(id(kept))
        found: list[tuple[Any, str, Any]] = []
        if isinstance(kept, FunctionType):
            for cell in kept.__closure__ or ():
                with contextlib.suppress(ValueError):  # empty: a name that is bound later
                    found.append((cell, CELL, cell.cell_contents))
        elif callable(kept) and not isinstance(kept, (type, torch.nn.Module)):
            found += [(kept, name, value) for name, value in getattr(kept, "__dict__", {}).items() if name != WRAPPED]
        yield from found
        waiting += [value for _, _, value in found if callable(value)]


def innermost(function: Any) -> Any:
    """Through bound methods and `functools.wraps`."""
    while True:
        inner = getattr(function, "__func__", None) or getattr(function, "__wrapped__", None)
        if inner is None:
            return function
        function = inner


def defining_class(module: torch.nn.Module) -> type[torch.nn.Module]:
    """The class whose `forward` an instance runs."""
    return next(cls for cls in type(module).__mro__ if "forward" in vars(cls))


class LiveModules:
    """The modules of a model under the class whose forward they run, held weakly: replacements outlive models.

    `dtype`: that of most of its numbers, float32 for a model without any.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        numbers: Counter[torch.dtype] = Counter({torch.float32: 0})
        for parameter in model.parameters():
            numbers[parameter.dtype] += parameter.numel() if parameter.is_floating_point() else 0
        self.dtype = max(numbers, key=numbers.__getitem__)
        self._by_class: dict[type, list[weakref.ref[torch.nn.Module]]] = {}
        for module in model.modules():
            self._by_class.setdefault(defining_class(module), []).append(weakref.ref(module))

    def of(self, cls: type) -> list[torch.nn.Module]:
        modules = [reference() for reference in self._by_class.get(cls, ())]
        return [module for module in modules if module is not None]

    def __iter__(self) -> Iterator[torch.nn.Module]:
        for cls in self._by_class:
            yield from self.of(cls)
