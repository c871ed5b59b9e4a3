"""What int8 products compute, of a model whose weights are dequantised: the inputs of those layers are rounded.

Each row of the inputs is quantised by its own maximum, as at run time; the product is one of float32. It differs from
that of int8 by the rounding of the dequantised weights to the model's dtype, which adds a few hundredths to the error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from npu_patch.ops.w8a8.quantised import by_token


class Int8Inputs(TorchFunctionMode):
    """Knows layers by where their weights are, of which experts use slices. `used`: the weights that it has met."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.weights = {_place(weight) for weight in weights}
        self.used: set[int] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.linear:
            return self._linear(*args, **kwargs)
        return function(*args, **kwargs)

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if _place(weight) not in self.weights:
            return functional.linear(input, weight, bias)
        self.used.add(_place(weight))
        rows = by_token(input.reshape(-1, input.shape[-1]))
        sums = functional.linear(rows.values.float(), weight.float()) * rows.scale[:, None]
        y = sums if bias is None else sums + bias.float()
        return y.to(input.dtype).view(*input.shape[:-1], len(weight))

    def has_met(self, weights: Iterable[Tensor]) -> bool:
        return any(_place(weight) in self.used for weight in weights)


def _place(weight: Tensor) -> int:
    return weight.untyped_storage().data_ptr()
