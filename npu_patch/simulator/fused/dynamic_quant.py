"""Dynamic symmetric quantisation of tokens: npu_dynamic_quant, and the one that is fused with add and RMSNorm.

Source: torch_npu's operator documentation (Atlas A2 and A3) and op-plugin's unit tests.
"""

from typing import Any

import torch
from torch import Tensor

from ..refusal import HALF, require, require_dtype, require_not_empty, require_same_dtype, short, values_count
from .int8 import IN_ONE_INT32, INT4, by_rows, target_of
from .kernel import Kernel

QUANT = "npu_dynamic_quant"
NORM = "npu_add_rms_norm_dynamic_quant"
UNUSED = (1,)  # shape of a result that was not asked for


def npu_dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`scale = max(abs(input)) / 127` of each row in float32, and `round(input / scale)` in int8.

    input: float16 or bfloat16, 2 or more dimensions. smooth_scales, of its dtype, multiplies it first: [H], or
    [groups, H] with the ends of the groups of rows in group_index (int32, increasing, up to the last row).
    dst_type quint4x2: 7 in the place of 127, eight values in each int32.
    """
    require_dtype(QUANT, "input", input, HALF)
    require(input.dim() >= 2, QUANT, f"input must have 2 dimensions or more, not {input.dim()}")
    require(quant_mode == "pertoken", QUANT, f"quant_mode {quant_mode!r} is not simulated, only 'pertoken' is")
    require(not dst_type_max, QUANT, f"dst_type_max must be 0 for integers, not {dst_type_max}")
    target = target_of(QUANT, "dst_type", dst_type)
    _check_packing(QUANT, input, target)
    values = input.float()
    if smooth_scales is not None:
        require_same_dtype(QUANT, input=input, smooth_scales=smooth_scales)
        values = values * _smooth(input, smooth_scales, group_index)
    else:
        require(group_index is None, QUANT, "group_index needs smooth_scales")
    return by_rows(values, target)


def _smooth(input: Tensor, smooth_scales: Tensor, group_index: Tensor | None) -> Tensor:
    """float32, to multiply the input by."""
    width = input.shape[-1]
    if group_index is None:
        require(smooth_scales.shape == (width,), QUANT, f"smooth_scales must be [{width}], not {_sizes(smooth_scales)}")
        return smooth_scales.float()
    require(
        smooth_scales.dim() == 2 and smooth_scales.shape[1] == width,
        QUANT,
        f"smooth_scales with group_index must be [groups, {width}], not {_sizes(smooth_scales)}",
    )
    require(
        group_index.dtype == torch.int32 and group_index.shape == smooth_scales.shape[:1],
        QUANT,
        f"group_index must be int32 [{smooth_scales.shape[0]}], not {short(group_index.dtype)} {_sizes(group_index)}",
    )
    rows = input.numel() // width
    if values_count():
        ends = group_index.tolist()
        require(
            ends == sorted(ends) and ends[0] >= 0 and ends[-1] == rows,
            QUANT,
            f"group_index must be increasing up to the {rows} rows, not {ends}",
        )
    group = torch.searchsorted(group_index.contiguous(), torch.arange(rows, dtype=torch.int32), right=True)
    return smooth_scales.float()[group.clamp(max=len(smooth_scales) - 1)].view(input.shape)


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    smooth_scale1: Tensor | None = None,
    smooth_scale2: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
    y_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x = x1 + x2`, its RMS norm times gamma plus beta in float32, quantised by rows once or twice.

    x1, x2: one shape of 2 to 8 dimensions, float16 or bfloat16; gamma, beta and the smooth scales, which multiply what
    is quantised: [H] of that dtype. output_mask: which of the two are wanted; without it the first is, and the second
    where both smooth scales are given. Returns y1, y2, x, scale1, scale2; what is not wanted holds one element.
    """
    require_dtype(NORM, "x1", x1, HALF)
    rows = {"gamma": gamma, "smooth_scale1": smooth_scale1, "smooth_scale2": smooth_scale2, "beta": beta}
    require_same_dtype(NORM, x1=x1, x2=x2, **rows)
    require(x1.shape == x2.shape, NORM, f"x1 {_sizes(x1)} and x2 {_sizes(x2)} must have one shape")
    require(2 <= x1.dim() <= 8, NORM, f"x1 must have 2 to 8 dimensions, not {x1.dim()}")
    require_not_empty(NORM, "x1", x1)
    for name, row in rows.items():
        require(row is None or row.shape == x1.shape[-1:], NORM, f"{name} must be [{x1.shape[-1]}]")
    target = target_of(NORM, "y_dtype", y_dtype)
    _check_packing(NORM, x1, target)
    wanted = _wanted(smooth_scale1, smooth_scale2, output_mask)
    wide = x1.float() + x2.float()
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gamma.float()
    if beta is not None:
        y = y + beta.float()
    results = []
    for is_wanted, smooth in zip(wanted, (smooth_scale1, smooth_scale2), strict=True):
        values = y if smooth is None else y * smooth.float()
        of_rows = by_rows(values, target)
        results.append(of_rows if is_wanted else tuple(result.new_full(UNUSED, 85) for result in of_rows))
    (y1, scale1), (y2, scale2) = results
    return y1, y2, wide.to(x1.dtype), scale1, scale2


def _wanted(smooth1: Tensor | None, smooth2: Tensor | None, output_mask: list[bool] | None) -> tuple[bool, bool]:
    if not output_mask:
        require(smooth2 is None or smooth1 is not None, NORM, "smooth_scale2 without output_mask needs smooth_scale1")
        return True, smooth2 is not None
    require(len(output_mask) == 2 and any(output_mask), NORM, f"output_mask must want one of two, not {output_mask}")
    for i, smooth in enumerate((smooth1, smooth2)):
        require(smooth is None or output_mask[i], NORM, f"smooth_scale{i + 1} needs output_mask[{i}]")
    return output_mask[0], output_mask[1]


def _check_packing(operator: str, input: Tensor, target: torch.dtype) -> None:
    require(
        target != INT4 or input.shape[-1] % IN_ONE_INT32 == 0,
        operator,
        f"the last dimension must be a multiple of {IN_ONE_INT32} for quint4x2, not {input.shape[-1]}",
    )


def _sizes(tensor: Tensor) -> list[Any]:
    return list(tensor.shape)


KERNELS = {QUANT: Kernel(npu_dynamic_quant), NORM: Kernel(npu_add_rms_norm_dynamic_quant)}
