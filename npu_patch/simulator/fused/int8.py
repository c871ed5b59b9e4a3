"""Arithmetic of the quantised operators: exact products of int8, scales, rows quantised by their own maximum.

Sources: torch_npu's operator documentation and the expectations of op-plugin's unit tests.
"""

import torch
from torch import Tensor

from ..refusal import given, require, short
from .companions import SCALAR_TYPES

INT8, INT4 = torch.int8, torch.quint4x2
TARGETS = {None: INT8, 1: INT8, 16: INT4, INT8: INT8, INT4: INT4}  # None, c10::ScalarType or torch.dtype
MOST = {INT8: 127, INT4: 7}
IN_ONE_INT32 = 8  # values of 4 bits


def product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight` of int8, exact in int32: float64 holds every partial sum, which is below 2**53 in magnitude.

    No sum of at most 65535 products leaves int32.
    """
    return (x.double() @ weight.double()).to(torch.int32)


def target_of(operator: str, name: str, asked: torch.dtype | int | None) -> torch.dtype:
    require(asked in TARGETS, operator, f"{name} must be None, torch.int8 or torch.quint4x2, not {asked}")
    return TARGETS[asked]


def output_of(operator: str, asked: torch.dtype | int | None, allowed: tuple[torch.dtype, ...]) -> torch.dtype:
    """The dtype that `output_dtype` says; None is int8."""
    dtype = SCALAR_TYPES.get(asked) if isinstance(asked, int) else asked or INT8
    names = ", ".join(map(short, allowed))
    found = given(dtype, operator, f"output_dtype must be one of {names}, not {asked}")
    require(found in allowed, operator, f"output_dtype must be one of {names}, not {short(found)}")
    return found


def by_rows(values: Tensor, target: torch.dtype = INT8) -> tuple[Tensor, Tensor]:
    """Symmetric per-row quantisation of float32 `values`: `round(values / scale)`, half to even, and the scale.

    A row of zeros has the scale 0 and stays zeros. Values of 4 bits are packed by eight, the first in the lowest bits.
    """
    scale = values.abs().amax(-1) / MOST[target]
    rounded = (values / scale.unsqueeze(-1)).nan_to_num(0.0).round()
    if target == INT8:
        return rounded.clamp(-128, 127).to(INT8), scale
    bits = rounded.clamp(-8, 7).to(torch.int64).bitwise_and(0xF).unflatten(-1, (-1, IN_ONE_INT32))
    packed = bits.bitwise_left_shift(torch.arange(0, 32, 4)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32), scale


def of_19_bits(scale: Tensor) -> Tensor:
    """A float32 scale as the cube unit's output reads it: the highest 19 of its bits."""
    return scale.contiguous().view(torch.int32).bitwise_and(-0x2000).view(torch.float32)


def scale_and_offset(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """What npu_trans_quant_param made of a scale (bits 0 to 31) and an offset (signed, bits 37 to 45)."""
    low = parameter.bitwise_and(0xFFFFFFFF)
    scale = torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).view(torch.float32)
    offset = parameter.bitwise_right_shift(37).bitwise_and(0x1FF)
    return of_19_bits(scale), torch.where(offset >= 256, offset - 512, offset)


def requantised(sums: Tensor, scale: Tensor, offset: Tensor | float) -> Tensor:
    """int8 of `sums * scale + offset`, through the 9 bits that the product is rounded to before the offset."""
    rounded = (sums.float() * scale).round().clamp(-256, 255)
    return (rounded + offset).round().clamp(-128, 127).to(INT8)
