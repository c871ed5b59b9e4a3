"""The op of linear layers in int8, and the cases at which it is checked on a device.

Rounding to int8 is a step function: next to a step, a right operator may be a step away from float64. So the inputs of
a case are whole multiples of a power of two with 127 of them in each row, which no rounding changes: there the exact
product is that of the dequantised weight. Each row has a power of two of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.w8a8.linear import TORCH_INT8, RowsOf, definition, int8_linear, rows_of
from npu_patch.ops.w8a8.npu import DYNAMIC_QUANT, NPU_INT8, QUANT_MATMUL, WIDEST
from npu_patch.ops.w8a8.quantised import MOST
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    FLOAT_DTYPES,
    Implementation,
    dtype_name,
    is_plain,
    layout,
    needs_operators,
)
from npu_patch.serving.op import Op

# A half precision result is rounded once; float32 ones are exact sums of less than 2**24, scaled.
ALLOWED = {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def why_unsupported(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: RowsOf
) -> str | None:
    given = (x, weight, scale) if bias is None else (x, weight, scale, bias)
    for each in given:
        if not is_plain(each):
            return f"a tensor of type {type(each).__name__}"
        if each.device != x.device:
            return f"input on {x.device}, a weight on {each.device}"
        if each is not weight and each.dtype not in FLOAT_DTYPES:
            return f"an input, scale or bias in {dtype_name(each.dtype)}"
    if weight.dtype != torch.int8 or dtype not in FLOAT_DTYPES:
        return f"a weight in {dtype_name(weight.dtype)} for a result in {dtype_name(dtype)}"
    if x.dim() == 0 or x.numel() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        return f"an input of {layout(x)}, a weight {list(weight.shape)}"
    if scale.numel() != len(weight) or not scale.is_contiguous():
        return f"scales {list(scale.shape)} of a weight {list(weight.shape)}"
    return None


def why_unsupported_by_npu(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: RowsOf
) -> str | None:
    if max(weight.shape) > WIDEST:
        return f"a weight {list(weight.shape)}, wider than {WIDEST}"
    return why_unsupported(x, weight, scale, bias, dtype, rows)


def _exact(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: RowsOf) -> Tensor:
    return definition(x, weight, scale, bias)


def _key(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, rows: RowsOf) -> Hashable:
    return *weight.shape, dtype, scale.dtype, None if bias is None else bias.dtype


W8A8 = Op(
    "w8a8",
    (
        Implementation(
            "torch_npu.npu_quant_matmul",
            ("npu",),
            partial(int8_linear, NPU_INT8),
            why_unsupported_by_npu,
            needs_operators(DYNAMIC_QUANT, QUANT_MATMUL),
        ),
        Implementation("torch, int32 sums", ("cuda", "cpu"), partial(int8_linear, TORCH_INT8), why_unsupported),
    ),
    _key,
    _exact,
)


def case(width_out: int, width_in: int, dtype: torch.dtype, of_scale: torch.dtype, of_bias: torch.dtype | None) -> Case:
    """A weight `[width_out, width_in]` for inputs and results in `dtype`."""

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shapes: list[tuple[tuple[int, ...], torch.dtype]]
        shapes = [((tokens, width_in), dtype), ((width_out, width_in), dtype), ((width_out, 1), of_scale)]
        return shapes if of_bias is None else [*shapes, ((width_out,), of_bias)]

    def call(function: Callable[..., Any], x: Tensor, weight: Tensor, scale: Tensor, *bias: Tensor) -> Any:
        values = (weight * 32).round().clamp(-MOST, MOST).to(torch.int8)
        return function(_on_steps(x), values, scale.abs() / 128, *bias or (None,), x.dtype, rows_of)

    biased = "" if of_bias is None else f", bias in {dtype_name(of_bias)}"
    named = dtype_name(dtype) if dtype == of_scale else f"{dtype_name(dtype)}, scales in {dtype_name(of_scale)}"
    return Case(
        W8A8, f"{width_in} to {width_out}, {named}{biased}", inputs, call, allowed=ALLOWED, differentiated=False
    )


def _on_steps(x: Tensor) -> Tensor:
    """Numbers that quantising by token leaves as they are."""
    whole = (x * 32).round().clamp(-MOST, MOST)
    whole[:, 0] = MOST
    return whole * 2.0 ** -(torch.arange(len(x), device=x.device) % 4 + 3)[:, None].to(x.dtype)
