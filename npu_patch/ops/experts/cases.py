"""What of the experts' operators is checked on a device before they serve a model: a layer of the same form with a few
experts, one of them without a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import Weights
from npu_patch.ops.experts.routed import EXPERTS, Experts, ExpertsForm, silu_of_halves
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Case
from npu_patch.serving.implementation import dtype_name

FEW_EXPERTS, CHOICES, TOKENS = 3, 2, 12
IDLE = 1  # the expert without a token


def case(experts: Experts) -> Case:
    """Of experts of the same form."""
    form = ExpertsForm.of(experts)
    inner, up_width = form.inner, form.up_width
    up_shapes, down_shapes = _shapes(form, form.width, up_width), _shapes(form, inner, form.width)

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        shapes = [(tokens, form.width), (tokens, CHOICES), *up_shapes * form.ups, *down_shapes]
        return [(shape, form.dtype) for shape in shapes]

    def layer(tensors: Iterator[Tensor], shapes: list[tuple[int, ...]]) -> Weights:
        weights = [next(tensors) for _ in (shapes[:-1] if form.biased else shapes)]
        bias = next(tensors) if form.biased else None
        width = weights[0].shape[-1 if form.transposed else -2]
        # Smaller by the width of what they multiply, as trained ones are; by a power of two, which rounds nothing.
        weights = [weight * 2.0 ** -round(math.log2(width) / 2) for weight in weights]
        if not form.in_memory:
            weights = [weight.mT.contiguous().mT for weight in weights]
        return Weights(tuple(weights), form.transposed, bias)

    def call(function: Callable[..., Any], tokens: Tensor, router_weights: Tensor, *rest: Tensor) -> Any:
        tensors = iter(rest)
        ups = tuple(layer(tensors, up_shapes) for _ in range(form.ups))
        experts = Experts(
            ups, layer(tensors, down_shapes), _gate(up_width * form.ups, inner) if form.own_gate else None
        )
        return function(tokens, _indices(len(tokens)).to(tokens.device), router_weights, experts)

    layout = f"{'packed' if form.packed else 'listed'}{', transposed' if form.transposed else ''}"
    layout += f"{'' if form.in_memory else ', turned in memory'}{', biased' if form.biased else ''}"
    ups = "" if form.ups == 1 else f"{form.ups} x "
    return Case(
        EXPERTS,
        f"{layout}, {form.width} to {ups}{up_width} and {inner} {dtype_name(form.dtype)}"
        f"{', a gate of their own' if form.own_gate else ''}",
        inputs,
        call,
        tokens=(TOKENS,),
        allowed=ALLOWED_OF_PRODUCTS,
    )


def _shapes(form: ExpertsForm, width_in: int, width_out: int) -> list[tuple[int, ...]]:
    """Of the weights of one product, and of its bias."""
    one = (width_out, width_in) if form.transposed else (width_in, width_out)
    bias = [(FEW_EXPERTS, width_out)] if form.biased else []
    return [(FEW_EXPERTS, *one), *bias] if form.packed else [*[one] * FEW_EXPERTS, *bias]


def _indices(tokens: int) -> Tensor:
    """Not sorted, no two choices of a token alike, and none on the idle expert."""
    busy = [expert for expert in range(FEW_EXPERTS) if expert != IDLE]
    return torch.tensor(
        [[busy[(token * token + choice) % len(busy)] for choice in range(CHOICES)] for token in range(tokens)]
    )


def _gate(up_width: int, inner: int) -> Callable[[Tensor], Tensor]:
    """Some gate in plain torch, as wide as the layer's."""
    return silu_of_halves if up_width == 2 * inner else torch.nn.functional.silu
