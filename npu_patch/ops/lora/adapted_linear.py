"""A linear layer with a low-rank adapter (LoRA, https://arxiv.org/abs/2106.09685): `y = x W' + b + s drop(x) A' B'`.

One autograd function in the place of the layer's, the adapter's and the dropout's own. It keeps x once, as it is given
(or what x can be made of again), and beside it what is small: `drop(x) A'` `[tokens, r]`, the adapter in the dtype that
it is multiplied in, and the mask of the dropout as the device's operator makes it (on an NPU one bit an element).
Dropped inputs are made again from x.

W may be int8 with a scale for each output (ops/w8a8/): x is then quantised once, however many layers share it, and
the gradient of x goes through the dequantised weight.

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

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from npu_patch.numerics.remade import Remade, remade
from npu_patch.numerics.results import in_dtype
from npu_patch.ops.w8a8.linear import RowsOf, rows_of
from npu_patch.ops.w8a8.linear import definition as int8_definition
from npu_patch.ops.w8a8.linear import through as through_int8
from npu_patch.ops.w8a8.npu import int8_products
from npu_patch.serving.implementation import layout

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Adapter(NamedTuple):
    """`down` (A) is `[r, in]`, `up` (B) `[out, r]`. `dropout`: the probability, 0 where nothing is dropped.
    `product` and `compute`: the dtypes of the layer's and of the adapter's products. `weight_scale`: `[out, 1]` beside
    an int8 weight, and `rows` who quantises the input of that, or knows it quantised."""

    down: Tensor
    up: Tensor
    scaling: float
    dropout: float
    product: torch.dtype
    compute: torch.dtype
    weight_scale: Tensor | None = None
    rows: RowsOf = rows_of

    @property
    def settings(self) -> tuple[float, float, torch.dtype, torch.dtype]:
        return self.scaling, self.dropout, self.product, self.compute


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """x `[..., in]`, weight `[out, in]`, bias `[out]` or None -> `[..., out]` in the dtype `product`."""
    return adapted_linears(x, [(weight, bias, adapter)])[0]


def adapted_linears(x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Adapter]]) -> tuple[Tensor, ...]:
    """Of several layers with one input and the same dtypes: what `adapted_linear` computes of each, bit by bit. x is
    widened once, the adapters are cast together, and the gradients of x are summed by the products that make them."""
    tensors = [
        each
        for weight, bias, adapter in layers
        for each in (weight, adapter.weight_scale, bias, adapter.down, adapter.up)
    ]
    return _AdaptedLinears.apply(tuple(adapter for _, _, adapter in layers), remade(x), x, *tensors)


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> Tensor:
    """Without dropout, in the dtype of what it is given: for float64."""
    scale = adapter.weight_scale
    by_layer = F.linear(x, weight, bias) if scale is None else int8_definition(x, weight, scale, bias)
    return by_layer + F.linear(F.linear(x, adapter.down), adapter.up) * adapter.scaling


def why_unsupported(x: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter) -> str | None:
    down, up, scale = adapter.down, adapter.up, adapter.weight_scale
    device = x.device
    for tensor in (x, weight, down, up) if bias is None else (x, weight, down, up, bias):
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return f"a tensor of type {type(tensor).__name__}"
        known = tensor.dtype in FLOAT_DTYPES or (tensor is weight and scale is not None)
        if not known or tensor.device != device:
            return f"input on {device}, a weight in {tensor.dtype} on {tensor.device}"
    if x.dim() < 2 or not x.numel():
        return f"an input of {layout(x)}"
    width_out, width_in = weight.shape
    if x.shape[-1] != width_in or down.shape[-1] != width_in or up.shape != (width_out, down.shape[0]):
        return (
            f"an input of {layout(x)}, a weight {list(weight.shape)}, an adapter {list(down.shape)}, {list(up.shape)}"
        )
    return None


OF_EACH = 5  # tensors that a layer brings: weight, its scale, bias, down, up
BIAS, DOWN, UP = 2, 3, 4
OF_EACH_SAVED = 6


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adapters: tuple[Adapter, ...], again: Remade | None, x: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        product, compute = adapters[0].product, adapters[0].compute
        own = _rows(in_dtype(product, x))
        wide = in_dtype(compute, own)
        used = _all_in(compute, [each for adapter in adapters for each in (adapter.down, adapter.up)])
        _, _, needs_x, *needed = ctx.needs_input_grad
        results, saved, keeps_x, rows = [], [], False, None
        for index, adapter in enumerate(adapters):
            (weight, scale, bias), (down, up) = tensors[OF_EACH * index :][:DOWN], used[2 * index :][:2]
            needs_weight, _, _, needs_down, needs_up = needed[OF_EACH * index :][:OF_EACH]
            added = None if bias is None else in_dtype(product, bias)
            if scale is None:
                y = F.linear(own, in_dtype(product, weight), added)
            else:
                int8 = int8_products(own.device.type)
                rows = adapter.rows(x, product, int8.quantise) if rows is None else rows
                y = int8.product(rows, weight, scale, added, product)
            dropped, mask = wide, None
            if adapter.dropout:
                dropped, mask = torch.native_dropout(wide, adapter.dropout, True)
            shrunk = dropped @ down.t()
            _add_product(y, shrunk, up.t(), adapter.scaling)
            # No view, which could not be changed in place: what torch's own linear returns. It is never compiled.
            results.append(y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[1]).data)
            saved += [
                weight if needs_x else None,
                scale if needs_x else None,
                down if needs_x else None,
                up if needs_x or needs_down else None,
                shrunk if needs_up else None,
                mask if needs_x or needs_down else None,
            ]
            keeps_x = keeps_x or needs_down or needs_weight
        ctx.make, parts = again if again is not None and keeps_x else (None, ())
        ctx.save_for_backward(x if keeps_x and not parts else None, *saved, *parts)
        ctx.set_materialize_grads(False)
        ctx.adapters, ctx.like = adapters, (x.shape, x.dtype)
        ctx.dtypes = tuple([None if each is None else each.dtype for each in tensors])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        device_type = next(each.device.type for each in gradients if each is not None)
        if torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _backward(ctx, gradients)
        return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    x, *saved = ctx.saved_tensors
    if ctx.make is not None:
        x = ctx.make(*saved[OF_EACH_SAVED * len(gradients) :])
    _, _, needs_x, *needed = ctx.needs_input_grad
    (shape, x_dtype), product, compute = ctx.like, ctx.adapters[0].product, ctx.adapters[0].compute
    own: Any = None if x is None else _rows(in_dtype(product, x))
    wide = None if own is None else in_dtype(compute, own)
    wanted = tuple([need and gradients[place // OF_EACH] is not None for place, need in enumerate(needed)])
    shapes = tuple([(each.down.shape, each.up.shape, each.scaling) for each in ctx.adapters])
    kinds = _side_by_side(shapes, wanted, ctx.dtypes)
    device = ctx.adapters[0].down.device
    flat = [torch.empty(length, dtype=compute, device=device) for _, _, length, _ in kinds]
    places = {
        place: all_of.as_strided(*where)
        for all_of, (_, _, _, of_kind) in zip(flat, kinds, strict=True)
        for place, where in of_kind
    }
    d_x: Tensor | None = None
    found: list[Tensor | None] = [None] * len(needed)
    for index, (adapter, dy) in enumerate(zip(ctx.adapters, gradients, strict=True)):
        if dy is None:
            continue
        first = OF_EACH * index
        weight, scale, down, up, shrunk, mask = saved[OF_EACH_SAVED * index :][:OF_EACH_SAVED]
        needs_weight, _, needs_bias, needs_down, needs_up = needed[first:][:OF_EACH]
        dy = _rows(dy)
        dy_used = in_dtype(compute, dy)
        if needs_up:
            torch.mm(dy_used.t(), shrunk, out=places[first + UP])
        through: Any = dy_used @ up if needs_x or needs_down else None
        if needs_down:
            torch.mm(through.t(), _kept(wide, mask, adapter), out=places[first + DOWN])
        if needs_weight:
            found[first] = (dy.t() @ own).to(ctx.dtypes[first])
        if needs_bias:
            found[first + BIAS] = dy.sum(0).to(ctx.dtypes[first + BIAS])
        if needs_x:
            if scale is None:
                d_x = _sum_with(d_x, dy, in_dtype(product, weight), x_dtype)
            else:
                by_layer = in_dtype(x_dtype, through_int8(dy, weight, scale))
                d_x = by_layer if d_x is None else d_x.add_(by_layer)
            if mask is None:
                _add_product(d_x, through, down, adapter.scaling)
            else:
                by_adapter = in_dtype(torch.promote_types(d_x.dtype, compute), through @ down)
                d_x.add_(_kept(by_adapter, mask, adapter), alpha=adapter.scaling)
    for all_of, (scaling, dtype, _, of_kind) in zip(flat, kinds, strict=True):
        scaled = _scaled(all_of, scaling, dtype)
        for place, where in of_kind:
            found[place] = places[place] if scaled is all_of else scaled.as_strided(*where)
    return None, None, None if d_x is None else d_x.view(shape), *found


Where = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, strides, offset
Kind = tuple[float, torch.dtype, int, tuple[tuple[int, Where], ...]]


@functools.lru_cache(1024)
def _side_by_side(
    shapes: tuple[tuple[torch.Size, torch.Size, float], ...], wanted: tuple[bool, ...], dtypes: tuple[Any, ...]
) -> tuple[Kind, ...]:
    """The gradients of adapters: those of one scaling and dtype lie side by side, and are scaled and cast at once. Of
    each such kind how long it is, and where in it each parameter's lies, by the place of that."""
    found: dict[tuple[float, torch.dtype], list[tuple[int, Where]]] = {}
    lengths: dict[tuple[float, torch.dtype], int] = {}
    for index, (down, up, scaling) in enumerate(shapes):
        for place, shape in enumerate((down, up), OF_EACH * index + DOWN):
            if wanted[place]:
                kind = scaling, dtypes[place]
                offset = lengths.get(kind, 0)
                found.setdefault(kind, []).append((place, (tuple(shape), (shape[1], 1), offset)))
                lengths[kind] = offset + shape.numel()
    return tuple([(*kind, lengths[kind], tuple(places)) for kind, places in found.items()])


def _sum_with(total: Tensor | None, left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """`total + left right`. Where autocast narrowed x, its gradients are summed in the dtype that it had."""
    if total is None:
        return in_dtype(dtype, left @ right)
    _add_product(total, left, right, 1.0)
    return total


def _all_in(dtype: torch.dtype, tensors: list[Tensor]) -> list[Tensor]:
    if len(tensors) <= 2 or any(each.dtype is dtype or each.dtype is not tensors[0].dtype for each in tensors):
        return [in_dtype(dtype, each) for each in tensors]
    flat = torch.cat([each.reshape(-1) for each in tensors]).to(dtype)
    parts = flat.split([each.numel() for each in tensors])
    return [part.view(each.shape) for part, each in zip(parts, tensors, strict=True)]


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _add_product(total: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """`total += scaling left right`, in place."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scaling)
    else:
        total.add_(left @ right, alpha=scaling)


def _kept(x: Any, mask: Tensor | None, adapter: Adapter) -> Tensor:
    """x where the mask keeps it, divided by the probability of that, else 0: the dropout, and its derivative."""
    if mask is None:
        return x
    return torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - adapter.dropout))


def _scaled(gradient: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """In the dtype of its parameter, rounded no more often than that takes."""
    if gradient.dtype != dtype and math.frexp(scaling)[0] in (0.5, -0.5):  # a power of 2 rounds nothing
        return torch.mul(gradient, scaling, out=torch.empty_like(gradient, dtype=dtype))
    gradient = in_dtype(dtype, gradient)
    return gradient if scaling == 1.0 else gradient.mul_(scaling)
