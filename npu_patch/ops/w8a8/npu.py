"""Int8 products by torch_npu's operators: npu_dynamic_quant for the inputs, npu_quant_matmul for the product.

The weight `[N, K]` is multiplied as a transposed view, the scale `[N, 1]` as a flat one: nothing is copied. The
operators take half precision; of float32 the rows are quantised by torch, and the int32 sums are scaled by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.ops.w8a8.linear import TORCH_INT8, Int8Products, scaled
from npu_patch.ops.w8a8.quantised import Quantised, by_token
from npu_patch.serving.operators import Operator

DYNAMIC_QUANT = Operator("npu_dynamic_quant")
QUANT_MATMUL = Operator("npu_quant_matmul", ("pertoken_scale", "bias", "output_dtype"))
WIDEST = 65535  # of either factor


def _quantise(x: Tensor) -> Quantised:
    if x.dtype == torch.float32:
        return by_token(x)
    return Quantised(*torch.ops.npu.npu_dynamic_quant(x))


def _product(rows: Quantised, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    turned, flat = weight.t(), scale.view(-1)
    if dtype == torch.float32:
        sums = torch.ops.npu.npu_quant_matmul(
            rows.values, turned, _taken(flat, torch.bfloat16), output_dtype=torch.int32
        )
        return scaled(sums, rows, scale, bias, dtype)
    y: Tensor = torch.ops.npu.npu_quant_matmul(
        rows.values,
        turned,
        _taken(flat, dtype) if dtype == torch.bfloat16 else flat.float(),
        pertoken_scale=rows.scale,
        bias=None if bias is None else _taken(bias, dtype),
        output_dtype=dtype,
    )
    return y


def _taken(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As the operator takes it for a result in `dtype`, half precision: in that, or in float32."""
    return tensor if tensor.dtype == dtype else tensor.float()


NPU_INT8 = Int8Products(_quantise, _product)


def int8_products(device_type: str) -> Int8Products:
    """For tensors of such a device."""
    return NPU_INT8 if device_type == "npu" else TORCH_INT8
