"""The residual's sum and its RMSNorm as one operation: `RMSNorm(x + residual)`, and `x + residual`.

Apart, the sum is written and read again, and the backward adds the gradient of the stream to that of the norm in a
launch of its own. Where no implementation here serves, an add is followed by what serves RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.ops.rms_norm import CASE_EPS, RMS_NORM, RMSNormVariant, unsupported_by_triton
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import TRITON, Implementation, dtype_name, is_plain, layout, needs_triton
from npu_patch.serving.op import Op

Run = Callable[[RMSNormVariant, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


def _triton(
    variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from npu_patch.kernels.rms_norm import add_rms_norm

    return add_rms_norm(x, residual, weight, eps, variant.gamma)


def _unsupported(variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> str | None:
    if variant.gate is not None:
        return "the norm is gated"
    if not is_plain(residual):
        return "tensor subclass"
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        return f"a residual of another shape: {layout(residual)}, dtype {residual.dtype}, on {residual.device.type}"
    if residual.stride(-1) != 1:
        return "a last dimension that is not contiguous"
    return unsupported_by_triton(variant, x, weight, eps)


def exact(
    variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return variant.exact(total, weight, eps), total


def key(variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float) -> Hashable:
    return RMS_NORM.key(variant, x, weight, eps, None, False)


# A call is the norm's variant, x and residual `[..., D]`, weight `[D]` or None, and eps; for the norm of x + residual,
# and x + residual.
ADD_RMS_NORM = Op(
    "add_rms_norm",
    (Implementation(TRITON, ACCELERATORS, _triton, _unsupported, needs_triton, optional=True),),
    key,
    exact,
)


def one_after_the_other(norm: Callable[..., Tensor]) -> Run:
    """A `run` of what serves where nothing here does: an add, then an implementation's `run` of RMSNorm."""

    def run(
        variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(variant, total, weight, eps), total

    return run


def case(
    variant: RMSNormVariant, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None, original: Alternative
) -> Case:
    """x and residual `[tokens, width]`, with a weight of `weight_dtype`, or None without one."""

    def call(function: Callable[..., Any], x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Any:
        return function(variant, x, residual, weight, CASE_EPS)

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        weights = [] if weight_dtype is None else [((width,), weight_dtype)]
        return [*[((tokens, width), dtype)] * 2, *weights]

    weighted = "" if weight_dtype is None else f", weight {dtype_name(weight_dtype)}"
    return Case(ADD_RMS_NORM, f"{variant.name}, {width} {dtype_name(dtype)}{weighted}", inputs, call, original)
