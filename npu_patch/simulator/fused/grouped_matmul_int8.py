"""What npu_grouped_matmul makes of the int8 sums of a group: scales of its weight and of its rows.

Sources: as grouped_matmul.py; int32 results, which go to npu_dequant_swiglu_quant, are of the documentation's list of
dtypes and of how vllm-ascend calls it.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..refusal import require, require_dtype, short
from .int8 import INT8, output_of, product, requantised, scale_and_offset

NAME = "npu_grouped_matmul"
F16, BF16, F32, I32, I64 = torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64
SCALES = {INT8: I64, BF16: BF16, F16: F32}  # of the weights, by the dtype of the result
GARBAGE = 85  # rows that are unwritten, where NaN is no value


@dataclass(frozen=True)
class Int8:
    """x and weight are int8. `of_weight`: [N] for each weight; `of_token`: [M] for each x."""

    output: torch.dtype
    of_weight: list[Tensor] | None
    of_token: list[Tensor] | None

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, group: int, of_x: int, rows: slice) -> Tensor:
        """The result of a group, whose rows are `rows` of the x of that number."""
        sums = product(x, weight)
        if bias is not None:
            sums = sums + bias
        if self.of_weight is None:
            return sums
        scale = self.of_weight[group]
        require(
            scale.shape == weight.shape[1:],
            NAME,
            f"scale must be [{weight.shape[1]}] for each weight, not {list(scale.shape)}",
        )
        if self.output == INT8:
            return requantised(sums, *scale_and_offset(scale))
        result = sums.float() * scale.float()
        if self.of_token is not None:
            result = result * self.of_token[of_x][rows].unsqueeze(-1)
        return result.to(self.output)


def int8(
    x: list[Tensor],
    weight: list[Tensor],
    scale: list[Tensor] | None,
    per_token_scale: list[Tensor] | None,
    output_dtype: torch.dtype | int | None,
    host_list: bool = False,
) -> Int8:
    """Checked by the tables of dtypes: scale int64 (of npu_trans_quant_param) gives int8, bfloat16 gives bfloat16 and
    float32 gives float16, the latter two with a float32 per_token_scale or none; no scale gives the int32 sums."""
    output = output_of(NAME, output_dtype, (INT8,) if host_list else (INT8, BF16, F16, I32))
    if output == I32:
        require(
            not scale and not per_token_scale, NAME, "an output_dtype of int32 takes no scale and no per_token_scale"
        )
        return Int8(output, None, None)
    require(bool(scale), NAME, f"int8 inputs need scale for a result of {short(output)}")
    assert scale is not None
    for tensor in scale:
        require(
            tensor.dtype == SCALES[output],
            NAME,
            f"scale must be {short(SCALES[output])} for a result of {short(output)}, not {short(tensor.dtype)}",
        )
    require(len(scale) == len(weight), NAME, f"scale must be as many as weight, {len(weight)}, not {len(scale)}")
    if weight[0].dim() == 3:
        require(
            scale[0].dim() == 2 and len(scale[0]) == len(weight[0]),
            NAME,
            f"scale must be [E, N] beside a weight [E, K, N], not {list(scale[0].shape)}",
        )
        scale = list(scale[0].unbind(0))
    if per_token_scale:
        require(output != INT8 and not host_list, NAME, f"per_token_scale is not for a result of {short(output)}")
        lengths = [tensor.shape[0] for tensor in x]
        for tensor in per_token_scale:
            require_dtype(NAME, "per_token_scale", tensor, (F32,))
        require(
            [list(tensor.shape) for tensor in per_token_scale] == [[length] for length in lengths],
            NAME,
            f"per_token_scale must be 1-D of the rows of each x, {lengths}, "
            f"not {[list(tensor.shape) for tensor in per_token_scale]}",
        )
    return Int8(output, scale, per_token_scale or None)


def empty(shape: tuple[int, int], dtype: torch.dtype) -> Any:
    """What is unwritten."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else GARBAGE, dtype=dtype)
