"""The largest tensor that anything made: whether something of a certain size ever existed."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """`elements`: the most of any tensor with memory that an operator returned within it."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else [result]:
            if type(each) is Tensor and each.device.type != "meta":
                self.elements = max(self.elements, each.numel())
        return result


class LargestFloat(Largest):
    """Of floats alone: views of int8 weights are no memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before, result = self.elements, super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(result, Tensor) and not result.is_floating_point():
            self.elements = before
        return result
