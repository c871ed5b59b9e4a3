"""Products of int8 matrices: npu_quant_matmul, and npu_trans_quant_param, which packs a scale for it.

Source: torch_npu's operator documentation (Atlas A2 and A3). Not simulated, and refused: values of 4 bits in int32,
float8, scales of blocks (`group_sizes`), which other chips have.
"""

from typing import Any

import torch
from torch import Tensor

from ..refusal import require, require_contiguous, require_dtype, require_not_empty, short
from .int8 import INT8, of_19_bits, output_of, product, requantised, scale_and_offset
from .kernel import Kernel

NAME = "npu_quant_matmul"
TRANS = "npu_trans_quant_param"
WIDEST = 65535
F16, BF16, F32, I32, I64 = torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    offset: Tensor | None = None,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
    group_sizes: list[int] | None = None,
    **others: Any,
) -> Tensor:
    """`(x1 @ x2 + int32 bias) * scale * pertoken_scale + float bias`: the sum exact in int32, the rest in float32.

    x1 [..., M, K] and x2 [..., K, N]: int8 of 2 to 6 dimensions. scale and offset: [1] or [N]; pertoken_scale: float32
    [M]; bias: [N], [1, N] for a result of 2 dimensions, or [batch, 1, N] for one of 3. By the dtype of the result
    (None is int8):
    bfloat16: scale float32 or bfloat16, pertoken_scale or none; bias int32, float32, bfloat16.
    float16: scale float32 with pertoken_scale and a bias of int32, float32, float16; without one, scale float32 or
    int64 (of npu_trans_quant_param; 19 bits of a float32 count either way) and a bias of int32.
    int8: scale float32 or int64, offset float32, bias int32. int32: the sum itself; scale float32 or bfloat16.
    """
    for name, value in others.items():
        require(value is None, NAME, f"{name} is for other chips than A2 and A3")
    require(not any(group_sizes or ()), NAME, f"group_sizes {group_sizes} is not simulated")
    _check_factors(x1, x2)
    require_not_empty(NAME, "scale", scale)
    target = output_of(NAME, output_dtype, (INT8, F16, BF16, I32))
    _check_dtypes(target, scale, offset, pertoken_scale, bias)
    _check_sizes(x1.shape[-2], x2.shape[-1], scale, offset, pertoken_scale)
    sums = _product(x1, x2)
    if bias is not None:
        _check_bias(bias, sums.shape)
        if bias.dtype == I32:
            sums = sums + bias
    if target == I32:
        return sums
    factor, shift = _factor(scale, target, pertoken_scale is not None)
    if target == INT8:
        return requantised(sums, factor, shift if offset is None else offset)
    result = sums.float() * factor
    if pertoken_scale is not None:
        result = result * pertoken_scale.unsqueeze(-1)
    if bias is not None and bias.dtype != I32:
        result = result + bias.float()
    return result.to(target)


def _check_factors(x1: Tensor, x2: Tensor) -> None:
    for name, tensor in (("x1", x1), ("x2", x2)):
        require_dtype(NAME, name, tensor, (INT8,))
        require(2 <= tensor.dim() <= 6, NAME, f"{name} must have 2 to 6 dimensions, not {tensor.dim()}")
        require_not_empty(NAME, name, tensor)
        require(tensor.shape[-1] <= WIDEST, NAME, f"the last dimension of {name} must be at most {WIDEST}")
    require(x1.shape[-1] == x2.shape[-2], NAME, f"x1 {list(x1.shape)} and x2 {list(x2.shape)} must have one K")


def _check_sizes(rows: int, columns: int, scale: Tensor, offset: Tensor | None, pertoken_scale: Tensor | None) -> None:
    for name, row in (("scale", scale), ("offset", offset)):
        fits = row is None or row.shape in ((1,), (columns,))
        require(fits, NAME, f"{name} must be [1] or [{columns}], not {_sizes(row)}")
    require(
        pertoken_scale is None or pertoken_scale.shape == (rows,),
        NAME,
        f"pertoken_scale must be [{rows}], the rows of x1, not {_sizes(pertoken_scale)}",
    )


def _product(x1: Tensor, x2: Tensor) -> Tensor:
    batches = [list(tensor.shape[:-2]) for tensor in (x1, x2)]
    try:
        torch.broadcast_shapes(*batches)
    except RuntimeError:
        require(False, NAME, f"the batches {batches[0]} and {batches[1]} cannot be broadcast")
    return product(x1, x2)


def _factor(scale: Tensor, target: torch.dtype, per_token: bool) -> tuple[Tensor, Tensor | float]:
    """float32, and the offset that was packed with it."""
    if scale.dtype == I64:
        return scale_and_offset(scale)
    return (scale.float() if per_token or target == BF16 else of_19_bits(scale)), 0.0


def _check_dtypes(
    target: torch.dtype, scale: Tensor, offset: Tensor | None, pertoken_scale: Tensor | None, bias: Tensor | None
) -> None:
    per_token = pertoken_scale is not None
    result = f"a result of {short(target)}" + (" with pertoken_scale" if per_token else "")
    scales = {BF16: (F32, BF16), I32: (F32, BF16), INT8: (F32, I64), F16: (F32,) if per_token else (F32, I64)}[target]
    biases = {BF16: (I32, F32, BF16), F16: (I32, F32, F16) if per_token else (I32,)}.get(target, (I32,))
    for name, value, dtypes in (("scale", scale, scales), ("bias", bias, biases), ("offset", offset, (F32,))):
        if value is not None:
            allowed = ", ".join(map(short, dtypes))
            require(
                value.dtype in dtypes, NAME, f"{name} must be one of {allowed} for {result}, not {short(value.dtype)}"
            )
    require(offset is None or target == INT8, NAME, f"offset is for a result of int8, not {result}")
    if pertoken_scale is not None:
        require(target in (BF16, F16), NAME, f"pertoken_scale is for bfloat16 and float16, not {result}")
        require_dtype(NAME, "pertoken_scale", pertoken_scale, (F32,))


def _check_bias(bias: Tensor, result: torch.Size) -> None:
    columns = result[-1]
    allowed: list[tuple[int, ...]] = [(columns,)]
    if len(result) == 2:
        allowed.append((1, columns))
    if len(result) == 3:
        allowed.append((result[0], 1, columns))
    require(
        tuple(bias.shape) in allowed,
        NAME,
        f"bias must be {' or '.join(str(list(shape)) for shape in allowed)} for a result {list(result)}, "
        f"not {_sizes(bias)}",
    )


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """int64: the highest 19 bits of a float32 scale, bit 46, and an offset rounded to 9 bits from bit 37 on.

    scale, offset: float32, contiguous, not empty, 1-D of one length or 1, or both [1, N]. round_mode 1 rounds to the
    19 bits, 0 cuts off.
    """
    require(round_mode in (0, 1), TRANS, f"round_mode must be 0 or 1, not {round_mode}")
    for name, tensor in (("scale", scale), ("offset", offset)):
        if tensor is None:
            continue
        require_dtype(TRANS, name, tensor, (F32,))
        require_contiguous(TRANS, name, tensor)
        require_not_empty(TRANS, name, tensor)
        require(
            tensor.dim() == 1 or (tensor.dim() == 2 and tensor.shape[0] == 1),
            TRANS,
            f"{name} must be 1-D or [1, N], not {_sizes(tensor)}",
        )
    bits = scale.view(I32).to(I64).bitwise_and(0xFFFFFFFF)
    if round_mode:
        bits = bits + 0xFFF + bits.bitwise_right_shift(13).bitwise_and(1)  # half to even
    packed = bits.bitwise_and(0xFFFFE000).bitwise_or(1 << 46)
    if offset is None:
        return packed
    fits = scale.shape == offset.shape or (scale.dim() == offset.dim() == 1 and 1 in (len(scale), len(offset)))
    require(fits, TRANS, f"scale {_sizes(scale)} and offset {_sizes(offset)} must have one shape")
    return packed.bitwise_or(offset.round().clamp(-256, 255).to(I64).bitwise_and(0x1FF).bitwise_left_shift(37))


def _sizes(tensor: Tensor | None) -> list[int]:
    return [] if tensor is None else list(tensor.shape)


KERNELS = {NAME: Kernel(npu_quant_matmul), TRANS: Kernel(npu_trans_quant_param)}
