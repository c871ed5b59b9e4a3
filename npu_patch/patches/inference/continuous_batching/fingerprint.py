"""What a captured step of a model depends on beside the numbers in its weights: where those are, and what its Python
looks at. A number that is written in place is seen by a replay; all of this is not."""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.serial import serial

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
OF_NO_CONSEQUENCE = ("training", "_parameters", "_buffers", "_modules")
DEEPEST = 3


def fingerprint(model: torch.nn.Module) -> Hashable:
    hooks = {name: each for name, each in vars(torch.nn.modules.module).items() if name.startswith("_global_")}
    classes = {type(module) for module in model.modules()}
    files = {sys.modules[cls.__module__] for cls in classes if not cls.__module__.startswith("torch.")}
    code = frozenset((serial(cls), serial(cls.forward)) for cls in classes)
    names = frozenset((file.__name__, tuple(map(serial, vars(file).values()))) for file in files)
    modules = tuple(_of_module(name, module) for name, module in model.named_modules())
    return modules, _plain(hooks, DEEPEST), code, names


def _of_module(name: str, module: torch.nn.Module) -> Hashable:
    own = {key: value for key, value in vars(module).items() if key not in OF_NO_CONSEQUENCE}
    tensors = (*module._parameters.items(), *module._buffers.items())
    return (
        name,
        serial(module),
        serial(type(module)),
        tuple((key, _where(each)) for key, each in tensors),
        _plain(own, DEEPEST),
    )


def _where(tensor: Tensor | None) -> Hashable:
    if tensor is None:
        return None
    kind = tensor.dtype, tensor.device, tuple(tensor.shape), tensor.stride()
    return (id(tensor), *kind) if tensor.is_meta or not _has_storage(tensor) else (tensor.data_ptr(), *kind)


def _has_storage(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)


def _plain(value: Any, deep: int) -> Hashable:
    if isinstance(value, PLAIN):
        return repr(value) if isinstance(value, float) else value
    if isinstance(value, Tensor):
        return _where(value)
    if deep and isinstance(value, Mapping):
        return tuple((_plain(key, 0), _plain(each, deep - 1)) for key, each in _items(value))
    if deep and isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(each, deep - 1) for each in value)
    if deep and type(value).__name__.endswith("Config"):
        return serial(value), _plain(vars(value), deep - 1)
    return serial(value)


def _items(mapping: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    yield from list(mapping.items())
