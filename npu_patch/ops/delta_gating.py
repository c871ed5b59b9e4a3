"""The gates of a gated delta net: `g = -exp(A_log) softplus(a + dt_bias)` and `beta = sigmoid(b)`.

g is the logarithm of the decay of the state (https://arxiv.org/abs/2412.06464), in float32 whatever the dtypes.
The backward keeps nothing but the arguments. No patch uses it: a layer computes its gates in the middle of its forward,
where nothing can be rebound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def delta_gating(a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """g float32 `[..., H]` and beta `[..., H]` in the dtype of b, for a and b `[..., H]`, a_log and dt_bias `[H]`."""
    return decay(a, a_log, dt_bias), torch.sigmoid(b)


def decay(a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
    """g alone; see `delta_gating`."""
    return _Decay.apply(a, a_log, dt_bias)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, a_log: Tensor, dt_bias: Tensor) -> Tensor:
        ctx.save_for_backward(a, a_log, dt_bias)
        return F.softplus(_shifted(a, dt_bias)).mul_(_rate(a_log))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dg: Tensor) -> tuple[Tensor | None, ...]:
        a, a_log, dt_bias = ctx.saved_tensors
        needs_a, needs_a_log, needs_dt_bias = ctx.needs_input_grad
        da = d_a_log = d_dt_bias = None
        shifted = _shifted(a, dt_bias)
        slope = dg * _rate(a_log)
        if needs_a_log:
            d_a_log = (slope * F.softplus(shifted)).flatten(0, -2).sum(0).to(a_log.dtype)
        if needs_a or needs_dt_bias:
            # softplus is the identity beyond 20, where its slope is within 2e-9 of the sigmoid.
            slope = slope.mul_(torch.sigmoid(shifted))
            da = slope.to(a.dtype) if needs_a else None
            d_dt_bias = slope.flatten(0, -2).sum(0).to(dt_bias.dtype) if needs_dt_bias else None
        return da, d_a_log, d_dt_bias


def _shifted(a: Tensor, dt_bias: Tensor) -> Tensor:
    dtype = torch.promote_types(a.dtype, torch.float32)
    return a.to(dtype) + dt_bias


def _rate(a_log: Tensor) -> Tensor:
    return a_log.to(torch.promote_types(a_log.dtype, torch.float32)).exp().neg_()
