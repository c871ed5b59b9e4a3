"""Layers that keep a function of their file are pickled with what is bound under its name, as pickle wants it.

transformers 5.0 to 5.14 notes on each attention layer which functions of its file a kernel may replace. Those that the
layer keeps stay the original's, whenever it was made and copied; so there is nothing to put back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch

from npu_patch.sites.sites import innermost


def classes_that_keep(function: Any, module: ModuleType) -> Iterator[type]:
    """The classes of `module` whose decorated `__init__` gives each instance `function`."""
    for cls in list(vars(module).values()):
        is_layer = isinstance(cls, type) and issubclass(cls, torch.nn.Module)
        if is_layer and _is_within(function, vars(cls).get("__init__")):
            yield cls


def keeps_functions(layer: torch.nn.Module, functions: Iterable[Any]) -> bool:
    kept = [value for values in (vars(layer), *_dictionaries(layer)) for value in values.values()]
    return any(value is function for function in functions for value in kept if isinstance(value, FunctionType))


def reduce_as_bound(layer: torch.nn.Module) -> Any:
    """For `copyreg.dispatch_table`."""
    reduced = layer.__reduce_ex__(4)
    if isinstance(reduced, tuple) and len(reduced) > 2 and type(reduced[2]) is dict:
        return *reduced[:2], _State(reduced[2]), *reduced[3:]
    return reduced


class _State(dict[str, Any]):
    """Of a layer, on the way into a pickle; copies keep what the layer keeps."""

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        items = (
            (name, _all_as_bound(value) if type(value) is dict else _as_bound(value)) for name, value in self.items()
        )
        return dict, (), None, None, items


def _all_as_bound(values: dict[Any, Any]) -> dict[Any, Any]:
    if any(isinstance(value, FunctionType) for value in values.values()):
        return {key: _as_bound(value) for key, value in values.items()}
    return values


def _as_bound(value: Any) -> Any:
    """What is bound under the name of a function, if the one wraps the other."""
    if not isinstance(value, FunctionType):
        return value
    present = getattr(sys.modules.get(value.__module__), value.__qualname__, value)
    return present if innermost(present) is innermost(value) else value


def _dictionaries(layer: torch.nn.Module) -> list[dict[Any, Any]]:
    return [value for value in vars(layer).values() if type(value) is dict]


def _is_within(function: Any, wrapper: Any) -> bool:
    """Whether a function's closure holds `function`, in a list or another function's closure perhaps."""
    if not isinstance(wrapper, FunctionType):
        return False
    cells: list[Any] = []
    for cell in wrapper.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # not filled yet
            continue
    held = [value for each in cells for value in (each if isinstance(each, (list, tuple)) else [each])]
    return any(value is function for value in held) or any(_is_within(function, value) for value in cells)
