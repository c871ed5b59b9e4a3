"""Whose a function or class is that somebody bound somewhere: told from where its code is, not from what it claims."""

from __future__ import annotations

import functools
from types import CellType, FunctionType, MethodType
from typing import Any

from npu_patch.sites.other_tools import of_tool

OWN = "npu_patch"
MOST_HELD = 64  # functions looked through for one that a wrapper holds
TORCH_NPU_OPERATORS = "torch._ops.npu"
_EMPTY = CellType()


def home(value: Any) -> str:
    """The module whose code it runs. `functools.wraps` copies `__module__`, so the globals are asked."""
    function = _function(value)
    if isinstance(function, FunctionType):
        return function.__globals__.get("__name__") or "?"
    if not isinstance(value, type) and not hasattr(value, "__name__"):
        value = type(value)
    module = getattr(value, "__module__", None) or "builtins"
    return "torch_npu" if module == TORCH_NPU_OPERATORS else module


def whose(value: Any) -> str:
    """Its module and name, for people; of a tool that is known, what hands it over too."""
    function = _function(value)
    code = getattr(function, "__code__", None)
    names = [getattr(code, "co_qualname", None), getattr(code, "co_name", None)]
    names += [getattr(function, "__qualname__" if isinstance(function, type) else "__name__", None)]
    name = next(filter(None, names), type(function).__qualname__)
    module = home(value)
    return f"{module}.{name}".replace(".<locals>", "") + of_tool(module)


def package(value: Any) -> str:
    return home(value).split(".", 1)[0]


def is_ours(value: Any) -> bool:
    """Whether it is a replacement of npu_patch, or calls one of its own."""
    return package(value) == OWN


def holds(wrapper: Any, function: Any) -> bool:
    """Whether `wrapper` keeps `function` where it can call it: in a closure, a default, a global or a partial."""
    waiting: list[Any] = [wrapper]
    seen: list[Any] = []
    while waiting and len(seen) < MOST_HELD:
        value = waiting.pop()
        if value is function:
            return True
        if any(value is each for each in seen):
            continue
        seen.append(value)
        waiting += _held(value)
    return False


def _held(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if not isinstance(value, FunctionType):
        return []
    defaults = (*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    used = [value.__globals__.get(name) for name in value.__code__.co_names]
    return [*called_within(value), *filter(callable, (*defaults, *used))]


def called_within(function: FunctionType) -> list[Any]:
    """What it wraps, and what its closure holds that can be called."""
    cells = [cell.cell_contents for cell in function.__closure__ or () if cell != _EMPTY]
    return list(filter(callable, (getattr(function, "__wrapped__", None), *cells)))


def _function(value: Any) -> Any:
    while isinstance(value, (MethodType, functools.partial, staticmethod, classmethod)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    return value
