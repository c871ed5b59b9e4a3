"""Any transformers code in float64, its own casts to narrower dtypes included: the reference of `verify`."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

NARROW = (torch.float32, torch.float16, torch.bfloat16)
CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)


@contextlib.contextmanager
def everything_in_float64() -> Iterator[None]:
    """Within, whatever is cast to, or made in, a narrower floating dtype is float64 instead."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Widen():
            yield
    finally:
        torch.set_default_dtype(before)


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy on the CPU, to be run within `everything_in_float64()`. Experts run eagerly: torch's grouped
    product has no float64."""
    copied = copy.deepcopy(model).cpu().double()
    for module in copied.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    return copied


class _Widen(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in CASTS:
            return args[0].double()
        args, kwargs = tree_map(_wide, (args, kwargs or {}))
        return func(*args, **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in NARROW else value
