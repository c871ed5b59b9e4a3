"""The op of adapted linears: its implementations, and the cases at which they are checked on a device."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.lora.adapted_linear import Adapter, adapted_linear, adapted_linears, definition, why_unsupported
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Case
from npu_patch.serving.implementation import Implementation, dtype_name

CASE_SCALING = 0.75

IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("one function", ("npu", "cuda", "cpu"), adapted_linear, why_unsupported),
)
# By its name, what computes several calls of one input at once, and each as it does.
TOGETHER = {"one function": adapted_linears}


def key_of(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Hashable:
    return *weight.shape, adapter.down.shape[0], adapter.product, adapter.compute


def case(width_out: int, width_in: int, rank: int, product: torch.dtype, compute: torch.dtype) -> tuple[Hashable, Case]:
    """With its key: a weight `[width_out, width_in]` in `product`, an adapter in `compute`, and nothing dropped."""

    def with_adapter(run: Callable[..., Any], x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Any:
        return run(x, weight, None, Adapter(down, up, CASE_SCALING, 0.0, x.dtype, down.dtype))

    named = f"{width_in} to {width_out}, rank {rank} {dtype_name(product)}"
    return (width_out, width_in, rank, product, compute), Case(
        "adapted_linear",
        named if product == compute else f"{named}, adapter in {dtype_name(compute)}",
        lambda tokens: [
            ((tokens, width_in), product),
            ((width_out, width_in), product),
            ((rank, width_in), compute),
            ((width_out, rank), compute),
        ],
        with_adapter,
        lambda *inputs: with_adapter(definition, *inputs),
        allowed=ALLOWED_OF_PRODUCTS,
        why_not=with_adapter,
    )
