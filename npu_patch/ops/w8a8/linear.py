"""A linear layer in int8: inputs quantised by token, exact int32 sums, two scales.

    q, s = by token of x
    y    = (q @ W.T) * scale * s + bias        sums in int32, the rest in float32, then the dtype of x
    dx   = (dy * scale) @ W                    as if x had not been rounded (straight through)

W `[N, K]` is int8 with a scale for each of its N outputs. The weight is frozen: nothing else has a gradient, but the
bias. The backward turns W into the dtype of dy in slices of its inputs, and keeps none: an int8 is exact in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.ops.w8a8.quantised import MOST, Quantised, by_token

SLICE = 32 * 2**20  # bytes of the weight in the dtype of the gradient at one time


@dataclass(frozen=True)
class Int8Products:
    """Of one device. `quantise(x [M, K])`; `product(rows, weight [N, K], scale [N, 1], bias [N] or None, dtype)` is
    `[M, N]` in that dtype."""

    quantise: Callable[[Tensor], Quantised]
    product: Callable[[Quantised, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


def int8_linear(products: Int8Products, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x `[..., K]`, weight int8 `[N, K]`, scale `[N, 1]`, bias `[N]` -> `[..., N]` in the dtype of x."""
    return _Int8Linear.apply(products, x, weight, scale, bias)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        products, x, weight, scale, bias = given
        ctx.save_for_backward(*((weight, scale) if ctx.needs_input_grad[1] else (None, None)))
        ctx.bias = None if bias is None else bias.dtype
        rows = products.quantise(x.reshape(-1, x.shape[-1]))
        return products.product(rows, weight, scale, bias, x.dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None if weight is None else through(rows, weight, scale).view(*dy.shape[:-1], weight.shape[1])
        dbias = rows.sum(0).to(ctx.bias) if ctx.needs_input_grad[4] else None
        return None, dx, None, None, dbias


def through(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`dy (W scale)`: dy `[M, N]` -> `[M, K]`."""
    scaled = dy * scale.view(-1).to(dy.dtype)
    wide = max(1, SLICE // (weight.shape[0] * dy.element_size()))
    if wide >= weight.shape[1]:
        return scaled @ weight.to(dy.dtype)
    return torch.cat([scaled @ part.to(dy.dtype) for part in weight.split(wide, 1)], -1)


def _sums(values: Tensor, weight: Tensor) -> Tensor:
    """int32 `[M, N]`."""
    if values.device.type == "cpu":
        return torch._int_mm(values, weight.t())
    return (values.double() @ weight.t().double()).to(torch.int32)  # exact: each sum is far below 2**53


def _torch_product(rows: Quantised, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = _sums(rows.values, weight).float() * scale.view(-1).float() * rows.scale[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


TORCH_INT8 = Int8Products(by_token, _torch_product)


def int8_products(device_type: str) -> Int8Products:
    return TORCH_INT8


def definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of x, for float64; the derivative is the straight-through one."""
    step = x.detach().abs().amax(-1, keepdim=True) / MOST
    rounded = (x.detach() / torch.where(step > 0, step, 1.0)).round() * step
    return F.linear(x + (rounded - x.detach()), weight.to(x.dtype) * scale.to(x.dtype), bias)
