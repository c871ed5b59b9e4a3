"""Aten operators that the npu device has and the CPU lacks, as formulas on CPU tensors, and compositions."""

import importlib.metadata
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import aten_recurrent, aten_softmax, counters
from .shared import Shared


def on_device(name: str, formula: Callable[..., Any]) -> Callable[..., Any]:
    """The formula as an npu kernel."""
    name = f"aten::{name.partition('.')[0]}"

    def kernel(*args: Any, **kwargs: Any) -> Any:
        shared = Shared(name)
        on_cpu = [shared.take(value) for value in args]
        named = {key: shared.take(value) for key, value in kwargs.items()}
        with torch._C._AutoDispatchBelowAutograd():
            result = formula(*on_cpu, **named)
        if counters.is_counting():
            given, made = [*on_cpu, *named.values()], result if isinstance(result, tuple) else (result,)
            for read, written in KERNELS.get(name, one_kernel)(given, made):
                counters.launch(name, read, written)
        return tuple(map(shared.give, result)) if isinstance(result, tuple) else shared.give(result)

    return kernel


Kernels = Iterable[tuple[Sequence[Any], Sequence[Any]]]  # what each one reads and writes


def one_kernel(given: Sequence[Any], made: Sequence[Any]) -> Kernels:
    return [(given, made)]


def one_product_for_each_gradient(given: Sequence[Any], made: Sequence[Any]) -> Kernels:
    """Of `matmul_backward`, which op-plugin composes of products: of grad and other, and of self and grad."""
    grad, self, other, *_ = given
    return [
        ((grad, factor), (gradient,))
        for factor, gradient in zip((other, self), made, strict=True)
        if gradient is not None
    ]


KERNELS: dict[str, Callable[[Sequence[Any], Sequence[Any]], Kernels]] = {
    "aten::matmul_backward": one_product_for_each_gradient
}


def matmul_backward(grad: Tensor, self: Tensor, other: Tensor, mask: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `self @ other` for any number of dimensions, each summed over the dimensions it was broadcast in."""
    if self.dim() > 2 and other.dim() == 2:  # rows of a linear layer: one product each, as torch folds them
        rows, grad_rows = self.reshape(-1, self.shape[-1]), grad.reshape(-1, grad.shape[-1])
        return (
            (grad_rows @ other.mH).view(self.shape) if mask[0] else None,
            rows.mH @ grad_rows if mask[1] else None,
        )
    left = self.unsqueeze(0) if self.dim() == 1 else self
    right = other.unsqueeze(1) if other.dim() == 1 else other
    if other.dim() == 1:
        grad = grad.unsqueeze(-1)
    if self.dim() == 1:
        grad = grad.unsqueeze(-2)
    grad_self = grad_other = None
    if mask[0]:
        grad_self = (grad @ right.mH).sum_to_size(left.shape).reshape(self.shape)
    if mask[1]:
        grad_other = (left.mH @ grad).sum_to_size(right.shape).reshape(other.shape)
    return grad_self, grad_other


def histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """The CPU takes floats only; the NPU integers too, and returns their dtype."""
    if self.is_floating_point():
        return torch.histc(self, bins, min, max)
    return torch.histc(self.double(), bins, min, max).to(self.dtype)


def one_hot(self: Tensor, num_classes: int = -1) -> Tensor:
    """The CPU takes int64 only; the NPU other integers too, and returns their dtype."""
    return torch.nn.functional.one_hot(self.long(), num_classes).to(self.dtype)


FORMULAS: dict[str, Callable[..., Any]] = {
    **aten_softmax.FORMULAS,
    **aten_recurrent.FORMULAS,
    "matmul_backward": matmul_backward,
    "histc": histc,
    "one_hot": one_hot,
}


def fill_diagonal_(self: Tensor, fill_value: Any, wrap: bool = False) -> Tensor:
    diagonal = torch.zeros(self.shape, dtype=torch.bool).fill_diagonal_(True, wrap)
    return self.masked_fill_(diagonal.to(self.device), fill_value)


def slogdet(self: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(torch.linalg.slogdet(self))


def scaled_dot_product_attention(*args: Any, **kwargs: Any) -> Tensor:
    """That of 2.7.1 makes causal masks by a launch of its own, which no dispatcher sees."""
    return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]


# What torch_npu computes with a CANN operator above autograd, as a composition of operators that have derivatives.
COMPOSITES: dict[str, Callable[..., Any]] = {
    "fill_diagonal_": fill_diagonal_,
    "slogdet": slogdet,
}
if importlib.metadata.version("torch_npu").startswith("2.7."):
    COMPOSITES["scaled_dot_product_attention"] = scaled_dot_product_attention
