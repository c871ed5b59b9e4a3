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

from npu_patch.numerics.results import changeable, in_dtype
from npu_patch.ops.w8a8.quantised import MOST, Quantised, by_token
from npu_patch.ops.weight_format import as_rows

SLICE = 32 * 2**20  # bytes of the weight in the dtype of the gradient at one time
EXACT_SUMS = 1024  # products of two int8 that float32 adds up exactly: 1024 * 127 * 127 < 2**24
Quantise = Callable[[Tensor], Quantised]


@dataclass(frozen=True)
class Int8Products:
    """Of one device. `quantise(x [M, K])`; `product(rows, weight [N, K], scale [N, 1], bias [N] or None, dtype)` is
    `[M, N]` in that dtype."""

    quantise: Quantise
    product: Callable[[Quantised, Tensor, Tensor, Tensor | None, torch.dtype], Tensor]


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of a layer's result: that of x or autocast's, which leaves float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def rows_of(x: Tensor, dtype: torch.dtype, quantise: Quantise) -> Quantised:
    """x `[..., K]`, as it is in `dtype`, quantised by token."""
    return quantise(in_dtype(dtype, x).reshape(-1, x.shape[-1]))


RowsOf = Callable[[Tensor, torch.dtype, Quantise], Quantised]


def int8_linear(
    products: Int8Products,
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    rows: RowsOf = rows_of,
) -> Tensor:
    """x `[..., K]`, weight int8 `[N, K]`, scale `[N, 1]`, bias `[N]` -> `[..., N]` in `dtype`. `rows`: who quantises x,
    or knows it quantised."""
    return _Int8Linear.apply(products, rows, dtype, x, weight, scale, bias)


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        products, rows, dtype, x, weight, scale, bias = given
        ctx.save_for_backward(*((weight, scale) if ctx.needs_input_grad[3] else (None, None)))
        ctx.of_bias = None if bias is None else bias.dtype
        y = products.product(rows(x, dtype, products.quantise), weight, scale, bias, dtype)
        return changeable(y.view(*x.shape[:-1], weight.shape[0]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        weight, scale = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = None if weight is None else through(rows, weight, scale).view(*dy.shape[:-1], weight.shape[1])
        dbias = rows.sum(0).to(ctx.of_bias) if ctx.needs_input_grad[6] else None
        return None, None, None, dx, None, None, dbias


def through(dy: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """`dy (W scale)`: dy `[M, N]` -> `[M, K]`."""
    weight, scaled = as_rows(weight), dy * scale.view(-1).to(dy.dtype)
    wide = max(1, SLICE // (weight.shape[0] * dy.element_size()))
    if wide >= weight.shape[1]:
        return _product(scaled, weight.to(dy.dtype))
    return torch.cat([_product(scaled, part.to(dy.dtype)) for part in weight.split(wide, 1)], -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """In their own dtype, whatever autocast's is."""
    device_type = left.device.type
    if not torch.is_autocast_enabled(device_type):
        return left @ right
    with torch.autocast(device_type, enabled=False):
        return left @ right


def _sums(values: Tensor, weight: Tensor) -> Tensor:
    """int32 `[M, N]`, on any device: none is known to multiply float64 everywhere."""
    if values.device.type == "cpu" and values.numel():
        return torch._int_mm(values, weight.t())
    weight = as_rows(weight)
    parts = zip(values.split(EXACT_SUMS, 1), weight.split(EXACT_SUMS, 1), strict=True)
    total, *others = [
        _product(of_values.float(), of_weight.t().float()).to(torch.int32) for of_values, of_weight in parts
    ]
    for each in others:
        total += each
    return total


def scaled(sums: Tensor, rows: Quantised, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """int32 sums `[M, N]` with both scales and the bias, in float32, then in `dtype`."""
    y = sums.float() * scale.view(-1).float() * rows.scale[:, None]
    return (y if bias is None else y + bias.float()).to(dtype)


def _torch_product(rows: Quantised, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return scaled(_sums(rows.values, weight), rows, scale, bias, dtype)


TORCH_INT8 = Int8Products(by_token, _torch_product)


def definition(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """In the dtype of x, for float64; the derivative is the straight-through one."""
    step = x.detach().abs().amax(-1, keepdim=True) / MOST
    rounded = (x.detach() / torch.where(step > 0, step, 1.0)).round() * step
    return F.linear(x + (rounded - x.detach()), weight.to(x.dtype) * scale.to(x.dtype), bias)
