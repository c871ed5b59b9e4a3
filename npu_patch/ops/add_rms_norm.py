"""The residual's sum and its RMSNorm as one operation: `RMSNorm(x + residual)`, and `x + residual`.

Apart, the sum is written and read again, and the backward adds the gradient of the stream to that of the norm in a
launch of its own. Where no implementation here serves, an add is followed by what serves RMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.ops.rms_norm import CASE_EPS, RMSNormVariant, unsupported_by_triton
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import TRITON, Implementation, dtype_name, is_plain, layout, needs_triton

Run = Callable[[RMSNormVariant, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor]]


def _triton(
    variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    from npu_patch.kernels.add_rms_norm import add_rms_norm

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


# Called with the norm's variant, x and residual `[..., D]`, weight `[D]` or None, and eps, `run` returns the norm of
# x + residual, and x + residual.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(TRITON, ACCELERATORS, _triton, _unsupported, needs_triton, optional=True),
)


def one_after_the_other(norm: Callable[..., Tensor]) -> Run:
    """A `run` of what serves where nothing here does: an add, then an implementation's `run` of RMSNorm."""

    def run(
        variant: RMSNormVariant, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm(variant, total, weight, eps), total

    return run


@dataclass(frozen=True)
class Sizes:
    """What decides the time of a call, but for the number of tokens."""

    variant: str
    width: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None

    @classmethod
    def of(cls, variant: RMSNormVariant, x: Tensor, weight: Tensor | None) -> Sizes:
        return cls(variant.name, x.shape[-1], x.dtype, None if weight is None else weight.dtype)


def case(sizes: Sizes, variant: RMSNormVariant, original: Alternative) -> Case:
    """The results are put side by side: a `Case` has one."""

    def call(run: Run, x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Tensor:
        return torch.cat(run(variant, x, residual, weight, CASE_EPS), -1)

    def definition(x: Tensor, residual: Tensor, weight: Tensor | None = None) -> Tensor:
        total = x + residual
        return torch.cat((variant.exact(total, weight, CASE_EPS), total), -1)

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        weights = [] if sizes.weight_dtype is None else [((sizes.width,), sizes.weight_dtype)]
        return [((tokens, sizes.width), sizes.dtype)] * 2 + weights

    weighted = "" if sizes.weight_dtype is None else f", weight {dtype_name(sizes.weight_dtype)}"
    name = f"{variant.name}, {sizes.width} {dtype_name(sizes.dtype)}{weighted}"
    return Case("add_rms_norm", name, inputs, call, definition, original)
