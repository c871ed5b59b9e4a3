"""The op of adapted linears, and the cases at which it is checked on a device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.ops.lora.adapted_linear import Adapter, adapted_linear, adapted_linears, definition, why_unsupported
from npu_patch.ops.lora.triton_kernels import (
    triton_adapted_linear,
    triton_adapted_linears,
    why_unsupported_by_triton,
)
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Case
from npu_patch.serving.implementation import TRITON, Implementation, dtype_name, needs_triton
from npu_patch.serving.op import Op

CASE_SCALING = 0.75


def _key(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Hashable:
    return *weight.shape, weight.dtype is torch.int8, adapter.down.shape[0], adapter.product, adapter.compute


ADAPTED_LINEAR = Op(
    "lora",
    (
        Implementation(
            TRITON, ACCELERATORS, triton_adapted_linear, why_unsupported_by_triton, needs_triton, optional=True
        ),
        Implementation("one function", ("npu", "cuda", "cpu"), adapted_linear, why_unsupported),
    ),
    _key,
    definition,
)
# By its name, what computes several calls of one input at once, and each as it does.
TOGETHER = {TRITON: triton_adapted_linears, "one function": adapted_linears}


def case(width_out: int, width_in: int, rank: int, product: torch.dtype, compute: torch.dtype) -> Case:
    """A weight `[width_out, width_in]` in `product`, an adapter in `compute`, and nothing dropped."""

    def with_adapter(function: Callable[..., Any], *inputs: Tensor) -> Any:
        x, weight, down, up = inputs
        return function(x, weight, None, Adapter(down, up, CASE_SCALING, 0.0, product, compute))

    named = f"{width_in} to {width_out}, rank {rank} {dtype_name(product)}"
    return Case(
        ADAPTED_LINEAR,
        named if product == compute else f"{named}, adapter in {dtype_name(compute)}",
        lambda tokens: [
            ((tokens, width_in), product),
            ((width_out, width_in), product),
            ((rank, width_in), compute),
            ((width_out, rank), compute),
        ],
        with_adapter,
        allowed=ALLOWED_OF_PRODUCTS,
    )


def int8_case(width_out: int, width_in: int, rank: int, product: torch.dtype, compute: torch.dtype) -> Case:
    """As `case`, but for a weight of all that int8 holds, which has no gradient."""

    def with_adapter(function: Callable[..., Any], *inputs: Tensor) -> Any:
        x, down, up = inputs
        numbers = torch.arange(width_out * width_in, device=x.device).view(width_out, width_in)
        weight = (numbers * 7919 % 255 - 127).to(torch.int8)
        of_scale = torch.float32 if product is torch.float16 else product
        scale = torch.full((width_out, 1), 2.0**-6, dtype=of_scale, device=x.device)
        return function(x, weight, None, Adapter(down, up, CASE_SCALING, 0.0, product, compute, scale))

    return Case(
        ADAPTED_LINEAR,
        f"{width_in} to {width_out} in int8, rank {rank} {dtype_name(product)}, adapter in {dtype_name(compute)}",
        lambda tokens: [((tokens, width_in), product), ((rank, width_in), compute), ((width_out, rank), compute)],
        with_adapter,
        allowed=ALLOWED_OF_PRODUCTS,
    )
