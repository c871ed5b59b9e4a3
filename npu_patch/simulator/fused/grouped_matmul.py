"""Grouped matrix products: npu_grouped_matmul and its legacy overload with a host list.

Source: torch_npu's operator documentation and the CANN kernel (ops-transformer, grouped_matmul). It has no derivative:
torch_npu warns in backward and the gradient is undefined.

Not simulated, and refused: quantised inputs, activations, sparse group lists (group_list_type 2).
"""

from typing import Any

import torch
from torch import Tensor

from .. import counters
from ..refusal import FLOATS, require, require_dtype, require_same_dtype, short
from .kernel import Kernel

NAME = "npu_grouped_matmul"
MOST_GROUPS = 1024  # one 3-D weight
MOST_WEIGHTS = 128  # a list of 2-D weights
WIDEST = 65536
BIAS_DTYPES = {torch.float16: torch.float16, torch.bfloat16: torch.float32, torch.float32: torch.float32}


def npu_grouped_matmul(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: int | None = None,
    **quantised: Any,
) -> list[Tensor]:
    """Products of groups of rows, accumulated in float32 with one rounding. x, weight and the result are lists.

    One dtype of float16, bfloat16, float32. group_list: int64 on the device, cumulative ends (group_list_type 0) or
    counts (1) of the groups.

    group_type 0: x [M, K] contiguous, weight [E, K, N] (contiguous or a transposed view) or E tensors [K, N]; group e
    of the rows times weight e; the result [M, N] is unwritten (NaN here) from the end of the last group on.
    group_type 2: x the transposed view [K, M] of a contiguous [M, K], weight [M, N]; the result [E, K, N] holds
    x.T @ weight of each group of rows, zeros for an empty one. split_item 2 or 3 gives one tensor.
    group_type -1: equally many x and weight, no group_list: x[i] @ weight[i].
    """
    require(group_type in (-1, 0, 2), NAME, f"group_type only supports -1, 0 and 2, but got {group_type}")
    _check_common(x, weight, bias, split_item, act_type, quantised)
    if group_type == -1:
        require(group_list is None, NAME, "group_type -1 takes no group_list")
        return _ungrouped(x, weight, bias)
    require(group_list is not None, NAME, f"group_type {group_type} needs group_list")
    require(
        group_list.dtype == torch.int64 and group_list.dim() == 1,
        NAME,
        f"group_list must be 1-D int64, not {short(group_list.dtype)} of shape {list(group_list.shape)}",
    )
    require(group_list_type in (0, 1), NAME, f"group_list_type {group_list_type} is not simulated (0 and 1 are)")
    if split_item in (0, 1) and group_type == 0:
        # The C++ wrapper reads the list on the host and takes it as cumulative.
        counters.host_copy("npu::npu_grouped_matmul", counters.tensor_bytes(group_list))
        return _several(x, weight, bias, group_list.tolist())
    ends = (group_list.cumsum(0) if group_list_type == 1 else group_list).tolist()
    require(
        group_list_type == 0 or len(ends) != 1, NAME, "group_list of counts (group_list_type 1) must be longer than 1"
    )
    return [_by_columns(x, weight, bias, ends)] if group_type == 2 else [_by_rows(x, weight, bias, ends)]


def npu_grouped_matmul_list(
    x: list[Tensor],
    weight: list[Tensor],
    *,
    bias: list[Tensor] | None = None,
    group_list: list[int] | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    act_type: int | None = 0,
    output_dtype: torch.dtype | None = None,
    **quantised: Any,
) -> list[Tensor]:
    """The overload with cumulative ends as a host list; group_type may be None, which means rows (0)."""
    require(group_type in (None, -1, 0, 2), NAME, f"group_type only supports -1, 0 and 2, but got {group_type}")
    _check_common(x, weight, bias, split_item, act_type, quantised)
    if group_list is None:
        require(group_type in (None, -1), NAME, f"group_type {group_type} needs group_list")
        return _ungrouped(x, weight, bias)
    if group_type == 2:
        return [_by_columns(x, weight, bias, group_list)]
    if split_item in (0, 1):
        return _several(x, weight, bias, group_list)
    return [_by_rows(x, weight, bias, group_list)]


def _ungrouped(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None) -> list[Tensor]:
    require(len(x) == len(weight), NAME, f"x and weight must be as many without groups, not {len(x)} and {len(weight)}")
    return [_product(x[i], weight[i], bias[i] if bias else None) for i in range(len(x))]


def _several(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, ends: list[int]) -> list[Tensor]:
    rows = _by_rows(x, weight, bias, ends)
    starts = [0, *ends[:-1]]
    return [rows[start:end].clone() for start, end in zip(starts, ends, strict=True)]


def _by_rows(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, ends: list[int]) -> Tensor:
    require(len(x) == 1, NAME, f"group_type 0 takes one x, not {len(x)}")
    rows = x[0]
    require(rows.dim() == 2, NAME, f"x must be [M, K] for group_type 0, not {list(rows.shape)}")
    require(
        rows.is_contiguous(),
        NAME,
        f"x must be contiguous, not transposed, for group_type 0 (strides {list(rows.stride())})",
    )
    weights = _weights(weight)
    biases = _biases(bias, len(weights))
    _check_ends(ends, rows.shape[0], len(weights))
    result = torch.full((rows.shape[0], weights[0].shape[1]), torch.nan, dtype=rows.dtype)
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            result[start:end] = _product(rows[start:end], weights[group], biases[group])
    return result


def _by_columns(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, ends: list[int]) -> Tensor:
    require(len(x) == 1 and len(weight) == 1, NAME, "group_type 2 takes one x and one weight")
    require(not bias, NAME, "group_type 2 takes no bias")
    columns, rows = x[0], weight[0]
    require(
        columns.dim() == 2 and rows.dim() == 2 and columns.shape[1] == rows.shape[0],
        NAME,
        f"group_type 2 needs x [K, M] and weight [M, N], not {list(columns.shape)} and {list(rows.shape)}",
    )
    require(
        columns.mT.is_contiguous(),
        NAME,
        "x must be the transposed view of a contiguous [M, K] for group_type 2 "
        f"(shape {list(columns.shape)}, strides {list(columns.stride())})",
    )
    require(rows.is_contiguous(), NAME, f"weight must be contiguous for group_type 2 (strides {list(rows.stride())})")
    _check_ends(ends, rows.shape[0], len(ends))
    result = torch.zeros((len(ends), columns.shape[0], rows.shape[1]), dtype=columns.dtype)
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        result[group] = _product(columns[:, start:end], rows[start:end], None)
    return result


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    require(
        x.shape[-1] == weight.shape[0],
        NAME,
        f"the last dimension of x {list(x.shape)} must be the first of weight {list(weight.shape)}",
    )
    product = x.float() @ weight.float()
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _weights(weight: list[Tensor]) -> list[Tensor]:
    """One [K, N] for each group, after checking how they are laid out."""
    dimensions = 3 if len(weight) == 1 else 2
    if len(weight) == 1 and weight[0].dim() == 2:
        dimensions = 2
    layouts = set()
    for tensor in weight:
        require(
            tensor.dim() == dimensions,
            NAME,
            f"weight must be one [E, K, N] or a list of [K, N], not {[list(w.shape) for w in weight]}",
        )
        transposed = not tensor.is_contiguous()
        require(
            not transposed or tensor.mT.is_contiguous(),
            NAME,
            "weight must be contiguous or the transposed view of a contiguous tensor "
            f"(shape {list(tensor.shape)}, strides {list(tensor.stride())})",
        )
        layouts.add(transposed)
    require(len(layouts) == 1, NAME, "weights must be all contiguous or all transposed views")
    if dimensions == 3:
        require(weight[0].shape[0] <= MOST_GROUPS, NAME, f"at most {MOST_GROUPS} groups, not {weight[0].shape[0]}")
        return list(weight[0].unbind(0))
    require(len(weight) <= MOST_WEIGHTS, NAME, f"at most {MOST_WEIGHTS} weights in a list, not {len(weight)}")
    return weight


def _biases(bias: list[Tensor] | None, groups: int) -> list[Tensor | None]:
    if not bias:
        return [None] * groups
    return list(bias[0].unbind(0)) if len(bias) == 1 and bias[0].dim() == 2 else list(bias)


def _check_ends(ends: list[int], rows: int, groups: int) -> None:
    require(len(ends) == groups, NAME, f"group_list must have one entry for each of {groups} groups, not {len(ends)}")
    require(
        all(a <= b for a, b in zip([0, *ends[:-1]], ends, strict=True)),
        NAME,
        f"group_list must be non-decreasing ends or non-negative counts (ends {ends})",
    )
    require(ends[-1] <= rows, NAME, f"group_list must not reach beyond the {rows} rows (ends at {ends[-1]})")


def _check_common(
    x: list[Tensor],
    weight: list[Tensor],
    bias: list[Tensor] | None,
    split_item: int | None,
    act_type: int | None,
    quantised: dict[str, Any],
) -> None:
    require(len(x) > 0 and len(weight) > 0, NAME, "x and weight must be non-empty lists of tensors")
    for argument, value in quantised.items():
        require(value is None or value == [], NAME, f"{argument} is not simulated")
    require(not act_type, NAME, f"act_type {act_type} is for quantised inputs, which are not simulated")
    require(split_item in (0, 1, 2, 3), NAME, f"split_item must be 0 to 3, not {split_item}")
    tensors = {f"x[{i}]": t for i, t in enumerate(x)} | {f"weight[{i}]": t for i, t in enumerate(weight)}
    require_same_dtype(NAME, **tensors)
    require_dtype(NAME, "x", x[0], FLOATS)
    for argument, tensor in tensors.items():
        require(
            tensor.dim() > 0 and tensor.shape[-1] < WIDEST,
            NAME,
            f"the last dimension of {argument} must be below {WIDEST}, not {list(tensor.shape)}",
        )
    for tensor in bias or []:
        expected = BIAS_DTYPES[x[0].dtype]
        require(
            tensor.dtype == expected,
            NAME,
            f"bias must be {short(expected)} with x {short(x[0].dtype)}, not {short(tensor.dtype)}",
        )


KERNELS = {
    "npu_grouped_matmul": Kernel(npu_grouped_matmul),
    "npu_grouped_matmul.List": Kernel(npu_grouped_matmul_list),
}
