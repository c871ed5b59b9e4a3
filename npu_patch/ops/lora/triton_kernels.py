"""Adapted linears by the Triton kernels: all beside the frozen products in a few launches, for several layers at once.

Float32 adapters multiply as they are, autocast or not, so nothing but rounding of the results sets these apart from
float64. The masks are the kernels' own: those of the dropout that they replace in distribution, not bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from npu_patch.kernels.lora.tiling import most_together
from npu_patch.numerics.remade import remade
from npu_patch.ops.lora.adapted_linear import Adapter, why_unsupported
from npu_patch.serving.implementation import dtype_name

Layer = tuple[Tensor, "Tensor | None", Adapter]


def triton_adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    return triton_adapted_linears(x, [(weight, bias, adapter)])[0]


def triton_adapted_linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Of several layers with one input, those together that follow each other and are alike but for their widths."""
    from npu_patch.kernels.lora.adapted_linears import Group, adapted_linears

    results: list[Tensor] = []
    for alike in _alike(layers):
        adapter = alike[0][2]
        group = Group(float(adapter.scaling), adapter.dropout, adapter.product)
        tensors = [(weight, bias, own.down, own.up) for weight, bias, own in alike]
        results += adapted_linears(x, tensors, group, remade(x))
    return tuple(results)


def _alike(layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    run: list[Layer] = []
    known: tuple[object, ...] = ()
    for layer in layers:
        adapter = layer[2]
        rank = adapter.down.shape[0]
        kind = (rank, adapter.down.dtype, *adapter.settings)
        if run and (kind != known or len(run) == most_together(rank)):
            yield run
            run = []
        known = kind
        run.append(layer)
    if run:
        yield run


def why_unsupported_by_triton(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> str | None:
    reason = why_unsupported(x, weight, bias, adapter)
    if reason is not None:
        return reason
    if adapter.weight_scale is not None:
        return "an int8 weight"
    rank, dtype = adapter.down.shape[0], adapter.down.dtype
    if not most_together(rank):
        return f"a rank of {rank}"
    if adapter.up.dtype is not dtype or dtype not in (torch.float32, adapter.product):
        return f"an adapter in {dtype_name(dtype)} and {dtype_name(adapter.up.dtype)}"
    return None
