"""A linear layer with a low-rank adapter (LoRA, https://arxiv.org/abs/2106.09685): `y = x W' + b + s drop(x) A' B'`.

One autograd function in the place of the layer's, the adapter's and the dropout's own. It keeps x once, as it is given,
and beside it what is small: `drop(x) A'` `[tokens, r]`, the adapter in the dtype that it is multiplied in, and the mask
of the dropout as the device's operator makes it (on an NPU one bit an element). Dropped inputs are made again from x.

Two dtypes decide how it is computed. The layer multiplies in `product`: autocast's, or that of its weight. The adapter
multiplies in `compute`: autocast's, or its own. Where they are one, the expanded adapter is added by the product that
expands it, in place. Float32 adapters beside a half precision layer (and no autocast) multiply in float32, as they do
unfused: both operands and the result, one module at a time, and nothing of it is kept. (A half precision product would
round `drop(x) A'` and the gradients of A and B to 8 bits, whatever the adapter is split into: the NPU's return the
dtype that they are given.) Such a sum is rounded once, where the original rounds both of its terms and the sum.

The mask is drawn by the operator that `torch.nn.functional.dropout` calls, for as many elements, in the same order:
under one seed it is the very mask of the original on the CPU and on an NPU, where x is contiguous. A GPU's draws go
with the dtype as well, which is not the original's under autocast.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from npu_patch.serving.implementation import layout

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(NamedTuple):
    """`down` (A) is `[r, in]`, `up` (B) `[out, r]`. `dropout`: the probability, 0 where nothing is dropped.
    `product` and `compute`: the dtypes of the layer's and of the adapter's products."""

    down: Tensor
    up: Tensor
    scaling: float
    dropout: float
    product: torch.dtype
    compute: torch.dtype


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """x `[..., in]`, weight `[out, in]`, bias `[out]` or None -> `[..., out]` in the dtype `product`."""
    return _AdaptedLinear.apply(x, weight, bias, adapter.down, adapter.up, adapter)


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """Without dropout, in the dtype of what it is given: for float64."""
    return F.linear(x, weight, bias) + F.linear(F.linear(x, adapter.down), adapter.up) * adapter.scaling


def why_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> str | None:
    down, up = adapter.down, adapter.up
    device = x.device
    for tensor in (x, weight, down, up) if bias is None else (x, weight, down, up, bias):
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return f"a tensor of type {type(tensor).__name__}"
        if tensor.dtype not in FLOAT_DTYPES or tensor.device != device:
            return f"input on {device}, a weight in {tensor.dtype} on {tensor.device}"
    if x.dim() < 2 or not x.numel():
        return f"an input of {layout(x)}"
    width_out, width_in = weight.shape
    if x.shape[-1] != width_in or down.shape[-1] != width_in or up.shape != (width_out, down.shape[0]):
        return f"an input of {layout(x)}, a weight {list(weight.shape)}, an adapter {list(down.shape)}, {list(up.shape)}"
    return None


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, adapter: Adapter
    ) -> Tensor:
        product, compute = adapter.product, adapter.compute
        own = _rows(_in(product, x))
        y = F.linear(own, _in(product, weight), None if bias is None else _in(product, bias))
        dropped, mask = _in(compute, own), None
        if adapter.dropout:
            dropped, mask = torch.native_dropout(dropped, adapter.dropout, True)
        down_used, up_used = _in(compute, down), _in(compute, up)
        shrunk = dropped @ down_used.t()
        _add_product(y, shrunk, up_used.t(), adapter.scaling)

        needs_x, needs_weight, _, needs_down, needs_up, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_down or needs_weight else None,
            weight if needs_x else None,
            down_used if needs_x else None,
            up_used if needs_x or needs_down else None,
            shrunk if needs_up else None,
            mask if needs_x or needs_down else None,
        )
        ctx.adapter, ctx.shape = adapter, x.shape
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype, down.dtype, up.dtype
        # No view, which could not be changed in place: what torch's own linear returns.
        return y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(dy.device.type):
            with torch.autocast(dy.device.type, enabled=False):
                return _backward(ctx, dy)
        return _backward(ctx, dy)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, down, up, shrunk, mask = ctx.saved_tensors
    needs_x, needs_weight, needs_bias, needs_down, needs_up, _ = ctx.needs_input_grad
    adapter, (x_dtype, weight_dtype, bias_dtype, down_dtype, up_dtype) = ctx.adapter, ctx.dtypes
    scaling, dy = adapter.scaling, _rows(dy)
    dy_used = _in(adapter.compute, dy)
    d_x = d_weight = d_bias = d_down = d_up = None
    if needs_up:
        d_up = _scaled(dy_used.t() @ shrunk, scaling, up_dtype)
    through = dy_used @ up if needs_x or needs_down else None
    del dy_used
    own = None if x is None else _rows(_in(adapter.product, x))
    if needs_down:
        d_down = _scaled(through.t() @ _kept(_in(adapter.compute, own), mask, adapter), scaling, down_dtype)
    if needs_weight:
        d_weight = (dy.t() @ own).to(weight_dtype)
    if needs_bias:
        d_bias = dy.sum(0).to(bias_dtype)
    del own
    if needs_x:
        d_x = dy @ _in(adapter.product, weight)
        if mask is None:
            _add_product(d_x, through, down, scaling)
            d_x = d_x.to(x_dtype)
        else:
            d_x = d_x.to(x_dtype)  # where autocast narrowed x, its gradients are summed in its dtype
            by_adapter = _in(torch.promote_types(x_dtype, adapter.compute), through @ down)
            d_x.add_(_kept(by_adapter, mask, adapter), alpha=scaling)
        d_x = d_x.view(ctx.shape)
    return d_x, d_weight, d_bias, d_down, d_up, None


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # to() costs the host something where it does nothing, too


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """`total += scaling left right`, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scaling)
    else:
        total.add_(left @ right, alpha=scaling)


def _kept(x: Tensor, mask: Tensor | None, adapter: Adapter) -> Tensor:
    """x where the mask keeps it, divided by the probability of that, else 0: the dropout, and its derivative."""
    if mask is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - adapter.dropout))


def _scaled(gradient: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """In the dtype of its parameter, rounded no more often than that takes."""
    if gradient.dtype != dtype and math.frexp(scaling)[0] in (0.5, -0.5):  # a power of 2 rounds nothing
        return torch.mul(gradient, scaling, out=torch.empty_like(gradient, dtype=dtype))
    gradient = gradient.to(dtype)
    return gradient if scaling == 1.0 else gradient.mul_(scaling)
