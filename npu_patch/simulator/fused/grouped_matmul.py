"""Grouped matrix products: npu_grouped_matmul and its legacy overload with a host list.

Source: torch_npu's operator documentation, op-plugin (GroupedMatmulKernelNpuOpApi.cpp) and CANN's checks
(ops-transformer, aclnn_grouped_matmul.cpp). It has no derivative: torch_npu warns in backward and the gradient is
undefined.

int8 inputs: grouped_matmul_int8.py. Not simulated, and refused: weights alone that are quantised (`antiquant_*`),
activations, sparse group lists (group_list_type 2).
"""

from typing import Any

import torch
from torch import Tensor

from ..refusal import FLOATS, given, require, require_dtype, require_same_dtype, short
from .companions import SCALAR_TYPES
from .grouped_matmul_int8 import Int8, empty, int8
from .kernel import Kernel

NAME = "npu_grouped_matmul"
MOST_GROUPS = 1024  # one 3-D weight
MOST_TENSORS = 128  # a list of x or of 2-D weights
WIDEST = 65536
BIAS_DTYPES = {
    torch.float16: torch.float16,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.int8: torch.int32,
}


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
    tuning_config: list[int] | None = None,
    output_dtype: int | None = None,
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    **others: Any,
) -> list[Tensor]:
    """Products of groups of rows, accumulated in float32 with one rounding. x, weight and the result are lists.

    One dtype of float16, bfloat16, float32; or int8 with scales (`int8` in grouped_matmul_int8.py) and an int32 bias,
    group_type 0 or -1. group_list: int64 on the device, cumulative ends (group_list_type 0 or
    None) or counts (1) of the groups. tuning_config is a hint: its first entry is 0 to the rows of x.

    group_type 0 needs split_item 2 or 3 and gives one tensor. One x [M, K], contiguous, and one weight [E, K, N]
    (contiguous or a transposed view) or several [K, N]: group e of the rows times weight e; the result [M, N] is
    unwritten (NaN here) from the end of the last group on. Several x and as many weights: the products, one below the
    other; a group_list, if any, says the rows of each x.
    group_type 2, with split_item 2 or 3: x the transposed view [K, M] of a contiguous [M, K], weight [M, N]; the result
    [E, K, N] holds x.T @ weight of each group of rows, zeros for an empty one.
    group_type -1, with split_item 0, 1 or None: as many x (2 to 6 dimensions) as weights, no group_list:
    x[i] @ weight[i].
    """
    require(group_type is not None, NAME, "Requires manual passing group_type, current is None")
    require(group_type in (-1, 0, 2), NAME, f"The group type must be -1, 0 or 2, but now is [{group_type}]")
    split = _check_common(x, weight, bias, split_item, act_type, others)
    scales = _scales(x, weight, scale, per_token_scale, output_dtype)
    if tuning_config:
        most = max(tensor.shape[0] for tensor in x)
        require(0 <= tuning_config[0] <= most, NAME, f"tuning_config[0] must be 0 to {most}, not {tuning_config[0]}")
    if group_type == -1:
        require(split in (0, 1), NAME, f"group_type -1 needs split_item 0 or 1, not {split_item}")
        require(group_list is None, NAME, "group_type -1 takes no group_list")
        return _ungrouped(x, weight, bias, scales)
    require(split in (2, 3), NAME, f"group_type {group_type} needs split_item 2 or 3, not {split_item}")
    several = None if group_list is None else _ends(group_list, group_list_type or 0)
    if group_type == 0 and len(x) > 1:
        return [_joined(x, weight, bias, several, scales)]
    ends = given(several, NAME, f"group_type {group_type} with one x needs group_list")
    if group_type == 2:
        require(scales is None, NAME, "group_type 2 takes no int8")
        return [_by_columns(x, weight, bias, ends)]
    return [_by_rows(x, weight, bias, ends, scales)]


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
    scale: list[Tensor] | None = None,
    per_token_scale: list[Tensor] | None = None,
    **others: Any,
) -> list[Tensor]:
    """The overload with cumulative ends as a host list, which reach the last row. Rows only; weights are [K, N] each.

    split_item 0 or 1 gives a tensor for each group (one x) or for each x (no group_list); 2 or 3 gives one. int8 gives
    int8 here, by an int64 scale.
    """
    require(group_type in (None, -1, 0), NAME, f"group_type with a host list must be None, not {group_type}")
    require(group_list_type in (None, 0), NAME, f"a host list holds ends: group_list_type is not {group_list_type}")
    split = _check_common(x, weight, bias, split_item, act_type, others)
    scales = _scales(x, weight, scale, per_token_scale, output_dtype, host_list=True)
    require(
        all(tensor.dim() == 2 for tensor in weight),
        NAME,
        f"weights beside a host list must be 2-D, not {[list(tensor.shape) for tensor in weight]}",
    )
    if not group_list:
        return _ungrouped(x, weight, bias, scales) if split in (0, 1) else [_joined(x, weight, bias, None, scales)]
    require(len(group_list) > 1, NAME, f"a host list must be longer than 1, not {group_list}")
    if len(x) > 1:
        require(split in (2, 3), NAME, f"split_item {split_item} with group_list takes one x, not {len(x)}")
        return [_joined(x, weight, bias, group_list, scales)]
    rows = _by_rows(x, weight, bias, group_list, scales)
    require(
        group_list[-1] == x[0].shape[0], NAME, f"group_list must end at the {x[0].shape[0]} rows, not {group_list[-1]}"
    )
    if split in (2, 3):
        return [rows]
    starts = [0, *group_list[:-1]]
    return [rows[start:end].clone() for start, end in zip(starts, group_list, strict=True)]


def _ungrouped(x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, scales: Int8 | None) -> list[Tensor]:
    require(len(x) == len(weight), NAME, f"x and weight must be as many without groups, not {len(x)} and {len(weight)}")
    require(
        len({tensor.dim() for tensor in x}) == 1 and 2 <= x[0].dim() <= 6,
        NAME,
        f"each x must have as many dimensions, 2 to 6, not {[list(tensor.shape) for tensor in x]}",
    )
    weights = _two_dimensional(weight)
    biases = _biases(bias, len(weights))
    return [_product(_contiguous(x[i]), weights[i], biases[i], scales, i, i) for i in range(len(x))]


def _joined(
    x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, ends: list[int] | None, scales: Int8 | None
) -> Tensor:
    """Products of several x with as many weights, one below the other."""
    require(len(x) == len(weight), NAME, f"x and weight must be as many, not {len(x)} and {len(weight)}")
    weights = _two_dimensional(weight)
    biases = _biases(bias, len(weights))
    require(all(tensor.dim() == 2 for tensor in x), NAME, f"each x must be 2-D, not {[list(t.shape) for t in x]}")
    require(
        len({tensor.shape[1] for tensor in weights}) == 1,
        NAME,
        f"weights must have one N, not {[list(tensor.shape) for tensor in weights]}",
    )
    lengths = [tensor.shape[0] for tensor in x]
    if ends is not None:
        _check_ends(ends, sum(lengths), len(x))
        groups = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        require(groups == lengths, NAME, f"group_list must give the rows of each x, {lengths}, not {groups}")
    return torch.cat([_product(_contiguous(x[i]), weights[i], biases[i], scales, i, i) for i in range(len(x))])


def _by_rows(
    x: list[Tensor], weight: list[Tensor], bias: list[Tensor] | None, ends: list[int], scales: Int8 | None
) -> Tensor:
    require(len(x) == 1, NAME, f"group_type 0 takes one x, not {len(x)}")
    rows = x[0]
    require(rows.dim() == 2, NAME, f"x must be [M, K] for group_type 0, not {list(rows.shape)}")
    weights = _weights(weight)
    biases = _biases(bias, len(weights))
    _check_ends(ends, rows.shape[0], len(weights))
    _contiguous(rows)
    result = empty((rows.shape[0], weights[0].shape[1]), scales.output if scales else rows.dtype)
    for group, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if end > start:
            of_group = slice(start, end)
            result[of_group] = _product(rows[of_group], weights[group], biases[group], scales, group, 0, of_group)
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
        result[group] = _product(columns[:, start:end], rows[start:end], None, None)
    return result


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scales: Int8 | None,
    group: int = 0,
    of_x: int = 0,
    rows: slice = slice(None),
) -> Tensor:
    require(
        x.shape[-1] == weight.shape[0],
        NAME,
        f"the last dimension of x {list(x.shape)} must be the first of weight {list(weight.shape)}",
    )
    if scales is not None:
        return scales.product(x, weight, bias, group, of_x, rows)
    product = x.float() @ weight.float()
    return (product if bias is None else product + bias.float()).to(x.dtype)


def _contiguous(x: Tensor) -> Tensor:
    require(
        x.is_contiguous(),
        NAME,
        f"x must be contiguous, not transposed, unless group_type is 2 (strides {list(x.stride())})",
    )
    return x


def _weights(weight: list[Tensor]) -> list[Tensor]:
    """One [K, N] for each group of rows of one x."""
    if len(weight) > 1:
        weights = _two_dimensional(weight)
        require(
            len({tensor.shape[1] for tensor in weights}) == 1,
            NAME,
            f"weights must have one N, not {[list(tensor.shape) for tensor in weights]}",
        )
        return weights
    only = weight[0]
    require(only.dim() == 3, NAME, f"weight must be one [E, K, N] or several [K, N], not {[list(only.shape)]}")
    require(only.shape[0] <= MOST_GROUPS, NAME, f"at most {MOST_GROUPS} groups, not {only.shape[0]}")
    _is_transposed(only)
    return list(only.unbind(0))


def _two_dimensional(weight: list[Tensor]) -> list[Tensor]:
    require(
        all(tensor.dim() == 2 for tensor in weight),
        NAME,
        f"weight must be one [E, K, N] or several [K, N], not {[list(tensor.shape) for tensor in weight]}",
    )
    layouts = {_is_transposed(tensor) for tensor in weight}
    require(len(layouts) == 1, NAME, "weights must be all contiguous or all transposed views")
    return weight


def _is_transposed(weight: Tensor) -> bool:
    require(
        weight.is_contiguous() or weight.mT.is_contiguous(),
        NAME,
        "weight must be contiguous or the transposed view of a contiguous tensor "
        f"(shape {list(weight.shape)}, strides {list(weight.stride())})",
    )
    return not weight.is_contiguous()


def _biases(bias: list[Tensor] | None, groups: int) -> list[Tensor | None]:
    if not bias:
        return [None] * groups
    biases: list[Tensor | None] = list(bias[0].unbind(0)) if len(bias) == 1 and bias[0].dim() == 2 else list(bias)
    require(len(biases) == groups, NAME, f"bias must be one for each of {groups} weights, not {len(biases)}")
    return biases


def _ends(group_list: Tensor, group_list_type: int) -> list[int]:
    require(
        group_list.dtype == torch.int64 and group_list.dim() == 1,
        NAME,
        f"group_list must be 1-D int64, not {short(group_list.dtype)} of shape {list(group_list.shape)}",
    )
    require(group_list_type in (0, 1), NAME, f"group_list_type {group_list_type} is not simulated (0 and 1 are)")
    require(group_list.numel() > 0, NAME, "group_list must not be empty")
    require(
        group_list_type == 0 or group_list.numel() != 1,
        NAME,
        "group_list of counts (group_list_type 1) must be longer than 1",
    )
    return (group_list.cumsum(0) if group_list_type == 1 else group_list).tolist()


def _scales(
    x: list[Tensor],
    weight: list[Tensor],
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    asked: torch.dtype | int | None,
    host_list: bool = False,
) -> Int8 | None:
    """None for floats, whose output_dtype is theirs."""
    dtype = x[0].dtype
    if dtype == torch.int8:
        return int8(x, weight, scale, per_token_scale, asked, host_list)
    for argument, value in (("scale", scale), ("per_token_scale", per_token_scale)):
        require(not value, NAME, f"{argument} is for int8 inputs, not {short(dtype)}")
    if asked is None:
        return None
    target = SCALAR_TYPES.get(asked) if isinstance(asked, int) else asked
    require(
        target == dtype,
        NAME,
        f"output_dtype must be None or that of x, {short(dtype)}, unless x is quantised, "
        f"not {short(target) if target else asked}",
    )
    return None


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
    others: dict[str, Any],
) -> int:
    """Returns split_item, which is 0 for None."""
    require(len(x) > 0 and len(weight) > 0, NAME, "x and weight must be non-empty lists of tensors")
    for argument, value in others.items():
        require(value is None or value == [], NAME, f"{argument} is not simulated")
    require(not act_type, NAME, f"act_type {act_type}, for quantised inputs, is not simulated")
    require(split_item in (None, 0, 1, 2, 3), NAME, f"split_item must be 0 to 3, not {split_item}")
    for argument, tensors in (("x", x), ("weight", weight)):
        require(len(tensors) <= MOST_TENSORS, NAME, f"at most {MOST_TENSORS} {argument} in a list, not {len(tensors)}")
    named = {f"x[{i}]": t for i, t in enumerate(x)} | {f"weight[{i}]": t for i, t in enumerate(weight)}
    require_same_dtype(NAME, **named)
    require_dtype(NAME, "x", x[0], (*FLOATS, torch.int8))
    for argument, tensor in named.items():
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
    return split_item or 0


KERNELS = {
    "npu_grouped_matmul": Kernel(npu_grouped_matmul),
    "npu_grouped_matmul.List": Kernel(npu_grouped_matmul_list),
}
