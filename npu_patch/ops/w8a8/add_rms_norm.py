"""The residual's sum, its RMSNorm and the quantisation of that by token in one operation, for layers of int8 weights.

The norm is that of the sum before it is rounded, and is quantised before it is rounded: a step nearer to the exact one
than an add, a norm and a quantisation. There is no derivative.

In a case the sums are whole multiples of a power of two with 127 first in each row, and gamma of powers of two that
leave them whole: there quantising changes nothing, as with int8 products (op.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.kernels.gamma import WEIGHT
from npu_patch.ops.add_rms_norm import exact, key
from npu_patch.ops.rms_norm import CASE_EPS, RMSNormVariant
from npu_patch.ops.w8a8.quantised import MOST, Quantised
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    HALF_DTYPES,
    Implementation,
    dtype_name,
    is_plain,
    layout,
    needs_operators,
)
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

OPERATOR = Operator("npu_add_rms_norm_dynamic_quant", ("epsilon", "output_mask"))
FIRST_ALONE = [True, False]  # of two quantisations
# Less than a step of 127, and what an operator may lose that rounds the norm on the way.
ALLOWED = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}


def _by_npu(
    variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Quantised, Tensor]:
    values, _, total, scale, _ = torch.ops.npu.npu_add_rms_norm_dynamic_quant(
        x, residual, weight, epsilon=eps, output_mask=FIRST_ALONE
    )
    return Quantised(values.view(-1, values.shape[-1]), scale.view(-1)), total


def why_unsupported(
    variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> str | None:
    """The operator takes gamma in the dtype of x: 1 + weight is not exact in half precision, and would be a launch in
    each call."""
    if variant.gate is not None or variant.gamma is not WEIGHT or weight is None:
        return f"the norm is {variant.name!r}: the operator multiplies by the weight as it is"
    if not (is_plain(x) and is_plain(residual) and is_plain(weight)):
        return "tensor subclass"
    if x.dtype not in HALF_DTYPES or not 2 <= x.dim() <= 8 or x.numel() == 0:
        return f"input of dtype {dtype_name(x.dtype)}, {layout(x)}"
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        return f"a residual of another shape: {layout(residual)}, dtype {residual.dtype}, on {residual.device.type}"
    if weight.shape != x.shape[-1:] or weight.dtype != x.dtype or weight.device != x.device:
        return f"weight of {layout(weight)}, {dtype_name(weight.dtype)}, on {weight.device.type}"
    if not isinstance(eps, (int, float)) or eps <= 0:
        return f"eps {eps}: rows of zeros need a positive one"
    return None


W8A8_ADD_RMS_NORM: Op[..., Any] = Op(
    "w8a8_norm",
    (
        Implementation(
            "torch_npu.npu_add_rms_norm_dynamic_quant", ("npu",), _by_npu, why_unsupported, needs_operators(OPERATOR)
        ),
    ),
    key,
    exact,
)


def case(variant: RMSNormVariant, width: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> Case[..., Any]:
    """x and residual `[tokens, width]`, with a weight of `weight_dtype`."""

    def call(function: Callable[..., Any], x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        found = function(variant, *_on_steps(x, residual), _of_powers(weight), CASE_EPS)
        if not isinstance(found, tuple) or not isinstance(found[0], Quantised):
            return found
        (values, scale), total = found
        return values * scale[:, None], total

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [*[((tokens, width), dtype)] * 2, ((width,), weight_dtype)]

    name = f"{variant.name}, {width} {dtype_name(dtype)}, weight {dtype_name(weight_dtype)}"
    return Case(W8A8_ADD_RMS_NORM, name, inputs, call, allowed=ALLOWED, differentiated=False)


def _on_steps(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Two that add up to multiples of 4 and a 127 in each row, times a power of two."""
    whole = (x * 16).round().clamp(-31, 31) * 4
    whole[:, 0] = MOST
    part = (residual * 16).round().clamp(-31, 31)
    step = 2.0 ** -(torch.arange(len(x), device=x.device) % 4 + 3)[:, None].to(x.dtype)
    return (whole - part) * step, part * step


def _of_powers(weight: Tensor) -> Tensor:
    """1, 1/2 or 1/4, of either sign; 1 first."""
    gamma = torch.where(weight < 0, -1.0, 1.0) * 2.0 ** -(weight.abs() * 4).floor().clamp(0, 2)
    gamma[0] = 1.0
    return gamma.to(weight.dtype)
