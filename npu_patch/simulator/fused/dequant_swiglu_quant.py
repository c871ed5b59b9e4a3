"""SwiGLU between two quantised products: npu_dequant_swiglu_quant.

Source: torch_npu's operator documentation (Atlas A2 and A3) and op-plugin's unit tests.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..refusal import HALF, given, require, require_dtype, values_count
from .int8 import INT8, by_rows, target_of
from .kernel import Kernel

NAME = "npu_dequant_swiglu_quant"
WIDEST_GROUPED, STEP_GROUPED = 10496, 64
GARBAGE = 85  # what rows of no group hold, beside a scale of NaN


def npu_dequant_swiglu_quant(
    x: Tensor,
    *,
    weight_scale: Tensor | None = None,
    activation_scale: Tensor | None = None,
    bias: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    group_index: Tensor | None = None,
    activate_left: bool = False,
    quant_mode: int = 0,
    dst_type: int | None = None,
    round_mode: int | None = None,
    activate_dim: int | None = None,
    swiglu_mode: int = 0,
    clamp_limit: float = 7.0,
    glu_alpha: float = 1.702,
    glu_bias: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """int8 [T, H] of SwiGLU of x [T, 2H], in float32, and the scale of each row (0 where quant_mode is 0, static).

    x int32: times weight_scale (float32 [groups, 2H]) and activation_scale (float32 [T] or [T, 1]), which it needs,
    after an int32 bias [2H]. x half: as it is, without these. The right half is activated unless activate_left;
    swiglu_mode 1 takes even and odd columns, clamped, with glu_alpha and glu_bias. Then, with quant_mode 1, times
    quant_scale [groups, H], and by rows; with 0, divided by it (float32) plus quant_offset.
    group_index (int64 counts of rows, one for each group): quant_mode 1, no bias, no quant_offset, H a multiple of 64
    and at most 10496; rows beyond their sum are garbage.
    """
    require(x.dim() == 2 and x.shape[1] % 2 == 0, NAME, f"x must be [T, 2H], not {list(x.shape)}")
    require_dtype(NAME, "x", x, (torch.int32, *HALF))
    require(quant_mode in (0, 1), NAME, f"quant_mode must be 0 or 1, not {quant_mode}")
    require(swiglu_mode in (0, 1), NAME, f"swiglu_mode must be 0 or 1, not {swiglu_mode}")
    require(target_of(NAME, "dst_type", dst_type) == INT8, NAME, "y is int8 only")
    require(not round_mode, NAME, f"round_mode {round_mode} is not simulated")
    require(activate_dim in (None, -1, 1), NAME, f"activate_dim {activate_dim} is not simulated, only the last is")
    tokens, width = x.shape[0], x.shape[1] // 2
    groups = 1 if group_index is None else len(group_index)
    _check_shape("weight_scale", weight_scale, (groups, 2 * width))
    _check_shape("activation_scale", activation_scale, (tokens,), (tokens, 1))
    _check_shape("bias", bias, (2 * width,), (1, 2 * width))
    _check_shape("quant_scale", quant_scale, (groups, width))
    _check_shape("quant_offset", quant_offset, (groups, width))
    of_row, rows = _groups(group_index, tokens, width, quant_mode, bias, quant_offset)
    values = _dequantised(x, weight_scale, activation_scale, bias, of_row)
    product = _swiglu(values, activate_left, swiglu_mode, clamp_limit, glu_alpha, glu_bias)
    y, scale = _quantised(product, quant_scale, quant_offset, quant_mode, of_row)
    y[rows:], scale[rows:] = GARBAGE, torch.nan
    return y, scale


def _groups(
    group_index: Tensor | None, tokens: int, width: int, quant_mode: int, bias: Tensor | None, offset: Tensor | None
) -> tuple[Tensor, int]:
    """The group of each row, and how many rows have one."""
    if group_index is None:
        return torch.zeros(tokens, dtype=torch.int64), tokens
    require(
        group_index.dim() == 1 and group_index.dtype == torch.int64 and len(group_index) > 0,
        NAME,
        f"group_index must be 1-D int64 counts, not {group_index.dtype} {list(group_index.shape)}",
    )
    require(quant_mode == 1, NAME, "group_index needs quant_mode 1")
    require(bias is None and offset is None, NAME, "group_index takes no bias and no quant_offset")
    require(
        width <= WIDEST_GROUPED and width % STEP_GROUPED == 0,
        NAME,
        f"H with group_index must be a multiple of {STEP_GROUPED} and at most {WIDEST_GROUPED}, not {width}",
    )
    ends = group_index.cumsum(0)
    if values_count():
        require(
            bool((group_index >= 0).all()) and int(ends[-1]) <= tokens,
            NAME,
            f"group_index must be counts of at most the {tokens} rows, not {group_index.tolist()}",
        )
    of_row = torch.searchsorted(ends, torch.arange(tokens), right=True).clamp(max=len(group_index) - 1)
    return of_row, int(ends[-1])


def _dequantised(
    x: Tensor, weight_scale: Tensor | None, activation_scale: Tensor | None, bias: Tensor | None, of_row: Tensor
) -> Tensor:
    if x.dtype != torch.int32:
        for name, value in (("weight_scale", weight_scale), ("activation_scale", activation_scale), ("bias", bias)):
            require(value is None, NAME, f"{name} must be None where x is {x.dtype}")
        return x.float()
    of_weight = given(weight_scale, NAME, "x of int32 needs weight_scale")
    of_token = given(activation_scale, NAME, "x of int32 needs activation_scale")
    require_dtype(NAME, "weight_scale", of_weight, (torch.float32,))
    require_dtype(NAME, "activation_scale", of_token, (torch.float32,))
    if bias is not None:
        require_dtype(NAME, "bias", bias, (torch.int32,))
        x = x + bias
    return x.float() * of_weight[of_row] * of_token.reshape(-1, 1)


def _swiglu(values: Tensor, left: bool, mode: int, limit: float, alpha: float, shift: float) -> Tensor:
    if mode == 1:
        gate, other = values[:, ::2].clamp(max=limit), values[:, 1::2].clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (other + shift)
    halves = values.chunk(2, -1)
    return silu(halves[0 if left else 1]) * halves[1 if left else 0]


def _quantised(
    values: Tensor, scale: Tensor | None, offset: Tensor | None, mode: int, of_row: Tensor
) -> tuple[Tensor, Tensor]:
    dtypes = (torch.float32, *HALF) if mode else (torch.float32,)
    if scale is not None:
        require_dtype(NAME, "quant_scale", scale, dtypes)
        by = scale.float()[of_row]
        values = values * by if mode else values / by
    if offset is not None:
        require_dtype(NAME, "quant_offset", offset, (torch.float32, *HALF))
        values = values if mode else values + offset.float()[of_row]
    if mode:
        return by_rows(values)
    return values.round().clamp(-128, 127).to(INT8), torch.zeros(len(values))


def _check_shape(name: str, tensor: Tensor | None, *allowed: tuple[int, ...]) -> None:
    require(
        tensor is None or tuple(tensor.shape) in allowed,
        NAME,
        f"{name} must be {' or '.join(str(list(shape)) for shape in allowed)}, "
        f"not {None if tensor is None else list(tensor.shape)}",
    )


KERNELS = {NAME: Kernel(npu_dequant_swiglu_quant)}
