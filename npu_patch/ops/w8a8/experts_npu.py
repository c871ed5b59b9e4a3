"""Int8 experts by torch_npu's operators: npu_dynamic_quant -> npu_moe_token_permute -> npu_grouped_matmul ->
npu_dequant_swiglu_quant -> npu_grouped_matmul -> npu_moe_token_unpermute.

Weights are multiplied as transposed views; nothing is copied but a small tensor of scales, where it is in another
dtype than the operator takes. Of SwiGLUs of other widths than npu_dequant_swiglu_quant takes, and of other gates, the
first product is scaled at once, and what the gate makes of it is quantised by rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import NPU_PRODUCTS, counts_or_ends
from npu_patch.ops.experts.token_permute import NPU_MOVES
from npu_patch.ops.w8a8.experts import Int8Kernels, Int8Weights
from npu_patch.ops.w8a8.linear import SLICE
from npu_patch.ops.w8a8.quantised import Quantised
from npu_patch.serving.operators import Operator

DYNAMIC_QUANT = Operator("npu_dynamic_quant")
GROUPED = Operator("npu_grouped_matmul", ("scale", "per_token_scale", "output_dtype", "group_list_type"))
SWIGLU_QUANT = Operator(
    "npu_dequant_swiglu_quant", ("weight_scale", "activation_scale", "group_index", "activate_left", "quant_mode")
)
WIDEST_FUSED, STEP_FUSED = 10496, 64  # inner widths of npu_dequant_swiglu_quant with groups
STEP = 16  # what slices of a weight are a multiple of
SCALES = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}  # by the dtype of the product


def _quantise(x: Tensor) -> Quantised:
    return Quantised(*torch.ops.npu.npu_dynamic_quant(x))


def _by_expert(tokens: Quantised, indices: Tensor) -> tuple[Quantised, Tensor]:
    """The operator moves floats: two int8 go as one of 16 bits, whatever it means."""
    values, positions = NPU_MOVES.permute(tokens.values.view(torch.bfloat16), indices)
    scale, _ = NPU_MOVES.permute(tokens.scale[:, None], indices)
    return Quantised(values.view(torch.int8), scale.flatten()), positions


def _product(rows: Quantised, weights: Int8Weights, counts: Tensor, dtype: torch.dtype) -> Tensor:
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [rows.values],
        [weights.values.mT],
        scale=[weights.scale.to(SCALES[dtype])],
        per_token_scale=[rows.scale],
        split_item=2,
        group_type=0,
        output_dtype=dtype,
        **counts_or_ends(counts),
    )
    return y


def _gated(rows: Quantised, up: Int8Weights, counts: Tensor, dtype: torch.dtype) -> Quantised:
    inner = up.scale.shape[1] // 2
    if inner > WIDEST_FUSED or inner % STEP_FUSED:
        return _quantise(_swiglu(_product(rows, up, counts, dtype)))
    (sums,) = torch.ops.npu.npu_grouped_matmul(
        [rows.values], [up.values.mT], split_item=2, group_type=0, output_dtype=torch.int32, **counts_or_ends(counts)
    )
    return Quantised(
        *torch.ops.npu.npu_dequant_swiglu_quant(
            sums,
            weight_scale=up.scale.float(),
            activation_scale=rows.scale,
            group_index=counts,
            activate_left=True,
            quant_mode=1,
        )
    )


def _swiglu(gate_up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(gate_up, dim=-1)


def _through(dy: Tensor, weights: Int8Weights, counts: Tensor) -> Tensor:
    experts, width, _ = weights.values.shape
    wide = max(STEP, SLICE // (experts * width * dy.element_size()) // STEP * STEP)
    scale = weights.scale.to(dy.dtype)[..., None]
    products = [
        NPU_PRODUCTS.by_rows(dy, [part * scale], counts, None, lambda: counts) for part in weights.values.split(wide, 2)
    ]
    return products[0] if len(products) == 1 else torch.cat(products, -1)


NPU = Int8Kernels(_quantise, NPU_MOVES, _by_expert, _product, _gated, _swiglu, _through)
