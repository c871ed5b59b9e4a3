"""An argument of a call as it was at that moment: copies of tensors, and of caches with the tensors in them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from npu_patch.waiting.contract import Waiting


def snapshot(value: Any) -> Any:
    """A detached copy of a tensor or a cache, which its calls write to; everything else is itself."""
    if isinstance(value, Waiting):
        value = value.peek()
    if isinstance(value, Tensor):
        return value if isinstance(value, Waiting) else detached(value)
    return copied_cache(value, detached) if is_cache(value) else value


def detached(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def is_cache(value: Any) -> bool:
    """What keeps the keys and states of earlier tokens; asked of the class, as deferred values answer to any name."""
    return hasattr(type(value), "get_seq_length")


def copied_cache(cache: Any, tensor_copied: Callable[[Tensor], Tensor]) -> Any:
    """A deep copy, its tensors by `tensor_copied`: by itself it stops at tensors that have a history."""
    with _CopyingTensors(tensor_copied):
        return copy.deepcopy(cache)


class _CopyingTensors(TorchFunctionMode):
    def __init__(self, tensor_copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._tensor_copied = tensor_copied

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__deepcopy__:
            return function(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), self._tensor_copied(tensor))
