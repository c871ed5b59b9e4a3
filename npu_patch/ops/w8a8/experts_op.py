"""The op of int8 experts, who computes it, and what of it is checked on a device before it serves a model."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import MOST_GROUPS, WIDEST, Weights
from npu_patch.ops.experts.routed import Experts, reference
from npu_patch.ops.experts.token_permute import MOST_EXPERTS_PER_TOKEN, NPU_PERMUTE, NPU_UNPERMUTE
from npu_patch.ops.swiglu import NPU_SWIGLU
from npu_patch.ops.w8a8.experts import TORCH, Int8Experts, Int8Weights, int8_experts
from npu_patch.ops.w8a8.experts_npu import DYNAMIC_QUANT, GROUPED, NPU, STEP_FUSED, SWIGLU_QUANT
from npu_patch.ops.w8a8.quantised import MOST
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    Implementation,
    dtype_name,
    is_plain,
    layout,
    needs_operators,
)
from npu_patch.serving.op import Op

FEW_EXPERTS, CHOICES, TOKENS = 3, 2, 12
ALLOWED = dict.fromkeys(FLOAT_DTYPES, 2.0**-4)  # both inputs are rounded to int8; what is wrong is off by its own size


def why_unsupported(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> str | None:
    up, down = experts.up, experts.down
    tensors = (tokens, indices, router_weights, up.values, up.scale, down.values, down.scale)
    if not all(is_plain(each) for each in tensors):
        return "tensor subclass"
    elsewhere = [each.device for each in tensors if each.device != tokens.device]
    if elsewhere:
        return f"tokens on {tokens.device.type}, weights or routing on {elsewhere[0].type}"
    if tokens.dtype not in FLOAT_DTYPES or not router_weights.is_floating_point():
        return f"tokens in {tokens.dtype}, router weights in {router_weights.dtype}"
    if {up.values.dtype, down.values.dtype} != {torch.int8}:
        return f"weights in {up.values.dtype} and {down.values.dtype}"
    if tokens.dim() != 2 or indices.dim() != 2 or indices.shape[0] != tokens.shape[0]:
        return f"tokens and indices of shapes that do not fit: {layout(tokens)}; {layout(indices)}"
    if router_weights.shape != indices.shape or indices.dtype not in (torch.int32, torch.int64):
        return f"router weights of another shape than indices: {layout(router_weights)}; {layout(indices)}"
    if not indices.numel():
        return "no tokens"
    for weights in (up, down):
        if weights.scale.shape != weights.values.shape[:2]:
            return f"scales {list(weights.scale.shape)} of weights {list(weights.values.shape)}"
    if not up.values.shape[2] == down.values.shape[1] == tokens.shape[1] or len(up.scale) != len(down.scale):
        return f"experts {list(up.values.shape)} and {list(down.values.shape)} for tokens of {tokens.shape[1]}"
    return None


def why_unsupported_by_npu(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> str | None:
    why = why_unsupported(tokens, indices, router_weights, experts)
    if why is not None:
        return why
    if tokens.dtype not in HALF_DTYPES:
        return f"tokens in {tokens.dtype}"
    if tokens.shape[1] % 2:
        return f"tokens of the odd width {tokens.shape[1]}"
    if indices.shape[1] > MOST_EXPERTS_PER_TOKEN:
        return f"{indices.shape[1]} experts for each token"
    for each in (experts.up.values, experts.down.values):
        if len(each) > MOST_GROUPS:
            return f"{len(each)} experts, more than {MOST_GROUPS}"
        if max(each.shape[1:]) > WIDEST:
            return f"weights of {each.shape[2]} by {each.shape[1]}"
        if not (each.is_contiguous() or each.mT.is_contiguous()):
            return f"weights of strides {each.stride()}"
    return None


def definition(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> Tensor:
    """With weights as they are, and nothing rounded to int8."""
    up, down = (
        Weights((each.values.to(tokens.dtype) * each.scale[..., None].to(tokens.dtype),), True)
        for each in (experts.up, experts.down)
    )
    return reference(tokens, indices, router_weights, Experts((up,), down, experts.gate))


def _key(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> Hashable:
    up, down = experts.up, experts.down
    layouts = [each.is_contiguous() for each in (up.values, down.values)]
    inner = down.values.shape[2]
    return tokens.dtype, inner % STEP_FUSED == 0, up.scale.dtype, *layouts, experts.gate is not None


INT8_EXPERTS = Op(
    "int8 experts",
    (
        Implementation(
            "torch_npu.npu_grouped_matmul of int8",
            ("npu",),
            partial(int8_experts, NPU),
            why_unsupported_by_npu,
            needs_operators(DYNAMIC_QUANT, GROUPED, SWIGLU_QUANT, NPU_PERMUTE, NPU_UNPERMUTE, NPU_SWIGLU),
        ),
        Implementation("torch, int32 sums", ("cuda", "cpu"), partial(int8_experts, TORCH), why_unsupported),
    ),
    _key,
    definition,
)


def case(experts: Int8Experts, dtype: torch.dtype) -> Case:
    """Of few and narrow experts of the same form: of the widths, it decides whether the inner one fits an operator."""
    up, down = experts.up, experts.down
    fits = down.values.shape[2] % STEP_FUSED == 0
    width, inner = 2 * STEP_FUSED, STEP_FUSED if fits else STEP_FUSED // 2
    up_width = up.values.shape[1] * inner // down.values.shape[2]
    turned = [not each.values.is_contiguous() for each in (up, down)]

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        of_up, of_down = (FEW_EXPERTS, up_width, width), (FEW_EXPERTS, width, inner)
        shapes = [(tokens, width), (tokens, CHOICES), of_up, of_up[:2], of_down, of_down[:2]]
        return [(shape, dtype) for shape in shapes]

    def call(function: Callable[..., Any], tokens: Tensor, router_weights: Tensor, *rest: Tensor) -> Any:
        own_up = Int8Weights(_values(rest[0], turned[0]), _scales(rest[1], up.scale.dtype))
        own_down = Int8Weights(_values(rest[2], turned[1]), _scales(rest[3], down.scale.dtype))
        indices = torch.arange(len(tokens) * CHOICES, device=tokens.device).view(-1, CHOICES) % FEW_EXPERTS
        return function(tokens, indices, router_weights, Int8Experts(own_up, own_down, experts.gate))

    form = f"{'' if fits else 'narrow, '}{'turned in memory, ' * any(turned)}{dtype_name(dtype)}"
    form += f", scales in {dtype_name(up.scale.dtype)}" * (up.scale.dtype != dtype)
    own = ", a gate of their own" if experts.gate is not None else ""
    return Case(INT8_EXPERTS, form + own, inputs, call, tokens=(TOKENS,), allowed=ALLOWED, differentiated=False)


def _values(weight: Tensor, turned: bool) -> Tensor:
    values = (weight * 32).round().clamp(-MOST, MOST).to(torch.int8)
    return values.mT.contiguous().mT if turned else values


def _scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (scale.abs() / 256).to(scale.dtype if scale.dtype == torch.float64 else dtype)
