"""Grouped matrix products: the rows of x, sorted by group, each times the weight of its group.

With c_e rows in group e, in the order of the groups:

    y[rows of e]  = x[rows of e] @ w[e] + bias[e]
    dx[rows of e] = dy[rows of e] @ w[e].T
    dw[e]         = x[rows of e].T @ dy[rows of e]
    dbias[e]      = sum of dy[rows of e]

Rows beyond the last group are neither read nor written: they hold anything, NaN included, in y and in dx.

The vendor's operator has no derivative (backward would warn and leave the gradient out), so the derivative is here. It
computes only the gradients that are asked for: frozen weights cost no dw, no [E, K, N] temporary and no saved x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.serving.operators import Operator

# Limits of npu_grouped_matmul (operator documentation).
MOST_GROUPS = 1024  # one 3-D weight
MOST_WEIGHTS = 128  # a list of 2-D weights
WIDEST = 65535
NPU_GROUPED_MATMUL = Operator(
    "npu_grouped_matmul", ("bias", "split_item", "group_type", "group_list", "group_list_type")
)
BIAS_DTYPES = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}


@dataclass(frozen=True)
class Products:
    """The two products of one device.

    `by_rows(x [M, K], weights, counts [E], bias [E, N] or None, groups)` is y `[M, N]`; weights are one `[E, K, N]` or
    E times `[K, N]`, contiguous or transposed views. `by_columns(columns [K, M], rows [M, N], counts)` is `[E, K, N]`,
    zeros where a group is empty; columns are the transposed view of a contiguous tensor. `groups()` is the group of
    each row.
    """

    by_rows: Callable[[Tensor, list[Tensor], Tensor, Tensor | None, Callable[[], Tensor]], Tensor]
    by_columns: Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Grouping:
    """How rows fall into groups. `counts`: int64 `[E]`, on the device of the rows; `groups()`: the group of each row,
    int64 `[M]`, E or more for rows beyond the last group; made only where a bias needs it."""

    counts: Tensor
    groups: Callable[[], Tensor]


@dataclass(frozen=True)
class Weights:
    """The weight of each group: one parameter of all, or one of each, as they are stored.

    `tensors`: one `[E, K, N]`, or E times `[K, N]`; `[.., N, K]` if `transposed`, as nn.Linear stores it. `bias`:
    `[E, N]` or None. Nothing is copied: layouts are views, and gradients come in the layout of the parameter.
    """

    tensors: tuple[Tensor, ...]
    transposed: bool
    bias: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.tensors[0].shape[0] if self.tensors[0].dim() == 3 else len(self.tensors)

    @property
    def width_in(self) -> int:
        return self.tensors[0].shape[-1 if self.transposed else -2]

    @property
    def width_out(self) -> int:
        return self.tensors[0].shape[-2 if self.transposed else -1]


def grouped_matmul(products: Products, x: Tensor, weights: Weights, grouping: Grouping) -> Tensor:
    """x `[M, K]`, its rows sorted by group -> `[M, N]`, differentiable in x, the weights and the bias."""
    return _GroupedMatmul.apply(products, grouping, weights.transposed, x, weights.bias, *weights.tensors)


class _GroupedMatmul(torch.autograd.Function):
    # All in one: without gradients Dynamo takes ctx away where it counts as many arguments as parameters.
    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        products, grouping, transposed, x, bias, *weights = given
        x = x.contiguous()  # the operator takes no transposed x
        _, _, _, x_needed, bias_needed, *weights_needed = ctx.needs_input_grad
        ctx.products, ctx.transposed, ctx.packed = products, transposed, weights[0].dim() == 3
        ctx.groups = grouping.groups if bias_needed else None
        ctx.bias = None if bias is None else (bias.shape, bias.dtype)
        ctx.save_for_backward(
            grouping.counts, x if any(weights_needed) else None, *(weights if x_needed else [None] * len(weights))
        )
        own = [weight.mT if transposed else weight for weight in weights]
        added = None if bias is None else bias.to(BIAS_DTYPES.get(x.dtype, x.dtype))
        return products.by_rows(x, own, grouping.counts, added, grouping.groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        counts, x, *weights = ctx.saved_tensors
        _, _, _, x_needed, bias_needed, *weights_needed = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = dbias = None
        dweights: Sequence[Tensor | None] = [None] * len(weights)
        if x_needed:
            turned = [weight if ctx.transposed else weight.mT for weight in weights]
            dx = ctx.products.by_rows(dy, turned, counts, None, ctx.groups)
        if any(weights_needed):
            columns, rows = (dy, x) if ctx.transposed else (x, dy)
            dweight = ctx.products.by_columns(columns.mT, rows, counts)
            each = [dweight] if ctx.packed else dweight.unbind(0)
            dweights = [one if needed else None for one, needed in zip(each, weights_needed, strict=True)]
        if bias_needed:
            shape, dtype = ctx.bias
            # One more group takes what lies beyond the last one.
            sums = dy.new_zeros((shape[0] + 1, shape[1]), dtype=torch.float32)
            sums.index_add_(0, ctx.groups().clamp(max=shape[0]), dy.float())
            dbias = sums[:-1].to(dtype)
        return None, None, None, dx, dbias, *dweights


def why_unsupported(weights: Weights, dtype: torch.dtype) -> str | None:
    """What npu_grouped_matmul cannot take of these, if anything."""
    first = weights.tensors[0]
    most = MOST_GROUPS if first.dim() == 3 else MOST_WEIGHTS
    if not 1 <= weights.groups <= most:
        return f"{weights.groups} experts, more than {most}"
    if max(weights.width_in, weights.width_out) > WIDEST or min(weights.width_in, weights.width_out) < 1:
        return f"weights of {weights.width_in} by {weights.width_out}"
    for tensor in weights.tensors:
        if tensor.dtype != dtype or tensor.shape != first.shape:
            return "experts of several dtypes or shapes"
        if not (tensor.is_contiguous() or tensor.mT.is_contiguous()) or tensor.stride() != first.stride():
            return f"weights of strides {tensor.stride()}"
    if weights.bias is not None and weights.bias.shape != (weights.groups, weights.width_out):
        return f"a bias of shape {tuple(weights.bias.shape)}"
    return None


def counts_or_ends(counts: Tensor) -> dict[str, Any]:
    # group_list_type 1 holds counts. Operator documentation: not for a list of length 1, whose count is its end too.
    return {"group_list": counts, "group_list_type": 1 if counts.numel() > 1 else 0}


def _npu_by_rows(
    x: Tensor, weights: list[Tensor], counts: Tensor, bias: Tensor | None, groups: Callable[[], Tensor]
) -> Tensor:
    biases = None if bias is None else [bias] if len(weights) == 1 else list(bias.unbind(0))
    # split_item 0 and 1 read the group list on the host; 2 and 3 give one tensor.
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [x], weights, bias=biases, split_item=2, group_type=0, **counts_or_ends(counts)
    )
    return y


def _npu_by_columns(columns: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [columns], [rows.contiguous()], split_item=3, group_type=2, **counts_or_ends(counts)
    )
    return y


def _torch_by_rows(
    x: Tensor, weights: list[Tensor], counts: Tensor, bias: Tensor | None, groups: Callable[[], Tensor]
) -> Tensor:
    weight = weights[0] if len(weights) == 1 and weights[0].dim() == 3 else torch.stack(weights)
    y = F.grouped_mm(x, weight, offs=counts.cumsum(0, dtype=torch.int32))
    if bias is not None:
        y = (y.float() + bias[groups().clamp(max=bias.shape[0] - 1)].float()).to(y.dtype)
    return y


def _torch_by_columns(columns: Tensor, rows: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(columns, rows, offs=counts.cumsum(0, dtype=torch.int32))


NPU_PRODUCTS = Products(_npu_by_rows, _npu_by_columns)
TORCH_PRODUCTS = Products(_torch_by_rows, _torch_by_columns)


def torch_is_missing() -> str | None:
    return None if hasattr(F, "grouped_mm") else "this torch has no torch.nn.functional.grouped_mm"
