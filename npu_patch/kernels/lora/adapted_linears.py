"""Linear layers with low-rank adapters that share one input: `y_i = x W_i' + b_i + s drop_i(x) A_i' B_i'`.

The frozen products are torch's, all else is four kernels, however many layers. Kept: x once, as it is given, h_i of
`[T, r]`, and the seed of the masks; no mask, no widened x, no dropped x. Float32 adapters are multiplied as they are,
whatever the dtype of x is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.kernels.lora.expand import expand_
from npu_patch.kernels.lora.input_side import add_input_side, rows_are_split_in
from npu_patch.kernels.lora.output_side import sum_ups, through_adapters
from npu_patch.kernels.lora.shrink import shrink
from npu_patch.kernels.partial_sums import sum_rows
from npu_patch.kernels.rows import rows_of

OF_EACH = 4  # tensors that a layer brings: weight, bias, down, up
LARGEST_SEED = 2**63 - 1


class Group(NamedTuple):
    """What the adapters of a group have in common. `product`: the dtype that their layers multiply in."""

    scaling: float
    dropout: float
    product: torch.dtype


def adapted_linears(
    x: Tensor, layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]], group: Group
) -> tuple[Tensor, ...]:
    """x `[..., in]`; of each layer a weight `[out, in]`, a bias, A `[r, in]` and B `[out, r]`, all A and B of one dtype
    and rank -> `[..., out]` of each. At most `tiling.MOST` layers."""
    return _AdaptedLinears.apply(group, x, *[tensor for layer in layers for tensor in layer])


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, x: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases, downs, ups = (tensors[index::OF_EACH] for index in range(OF_EACH))
        _, needs_x, *needed = ctx.needs_input_grad
        own = rows_of(_in(group.product, x))
        downs, ups = [each.contiguous() for each in downs], [each.contiguous() for each in ups]
        seed = torch.randint(LARGEST_SEED, (1,), device=x.device) if group.dropout else None
        h = shrink(own, downs, seed, group.dropout)
        ys = [
            F.linear(own, _in(group.product, weight), None if bias is None else _in(group.product, bias))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        expand_(ys, h, ups, group.scaling)
        needs_down, needs_up = any(needed[2::OF_EACH]), any(needed[3::OF_EACH])
        ctx.save_for_backward(
            x if needs_down or any(needed[0::OF_EACH]) else None,
            h if needs_up else None,
            seed if needs_x or needs_down else None,
            *[weight if needs_x else None for weight in weights],
            *[down if needs_x else None for down in downs],
            *[up if needs_x or needs_down else None for up in ups],
        )
        ctx.set_materialize_grads(False)
        ctx.group, ctx.like = group, (x.shape, x.dtype)
        ctx.dtypes = [None if each is None else each.dtype for each in tensors]
        ctx.shapes = [down.shape for down in downs], [up.shape for up in ups]
        # No view, which could not be changed in place: what torch's own linear returns.
        return tuple(y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        device_type = next(each.device.type for each in gradients if each is not None)
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _backward(ctx, gradients)
        return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    (x, h, seed, *saved), count = ctx.saved_tensors, len(gradients)
    weights, downs, ups = saved[:count], saved[count : 2 * count], saved[2 * count :]
    (shape, x_dtype), group = ctx.like, ctx.group
    _, needs_x, *needed = ctx.needs_input_grad
    used = [dy is not None for dy in gradients]
    needs = [need and used[index // OF_EACH] for index, need in enumerate(needed)]
    needs_down, needs_up = any(needs[2::OF_EACH]), any(needs[3::OF_EACH])
    like = next(dy for dy in gradients if dy is not None)
    rows = like.numel() // like.shape[-1]
    down_shapes, up_shapes = ctx.shapes
    # An output that nothing used has a gradient of zeros for the others' sake, and its own layer gets none.
    dys = [
        like.new_zeros(rows, up[0]) if dy is None else rows_of(dy) for dy, up in zip(gradients, up_shapes, strict=True)
    ]
    own = None if x is None else rows_of(_in(group.product, x))
    dx = _through_layers(gradients, weights, group.product, x_dtype) if needs_x else None

    up_sizes = [shape.numel() for shape in up_shapes] if needs_up else []
    down_sizes = [shape.numel() for shape in down_shapes] if needs_down else []
    partial = None
    if needs_up or needs_down:
        splits = rows_are_split_in(down_shapes[0][1], rows, down_shapes[0][0], like.device)
        size = sum(up_sizes) + sum(down_sizes)
        partial = torch.empty(splits, size, dtype=torch.float32, device=like.device)
    if needs_up:
        sum_ups(partial, dys, h, group.scaling)
    if needs_x or needs_down:
        through = through_adapters(dys, ups, group.scaling / (1.0 - group.dropout))
        rest = partial[:, sum(up_sizes) :] if needs_down else None
        own_again = own if needs_down else None
        add_input_side(dx, rest, own_again, through, downs, down_shapes[0][1], seed, group.dropout, group.product)
    sums = [] if partial is None else sum_rows(partial, ctx.dtypes[2]).split(up_sizes + down_sizes)
    d_ups = [part.view(shape) for part, shape in zip(sums, up_shapes, strict=False)] if needs_up else None
    d_downs = [part.view(shape) for part, shape in zip(sums[len(up_sizes) :], down_shapes, strict=False)]

    found: list[Tensor | None] = []
    for index, dy in enumerate(dys):
        needs_weight, needs_bias, needs_this_down, needs_this_up = needs[OF_EACH * index :][:OF_EACH]
        found += [
            (dy.t() @ own).to(ctx.dtypes[OF_EACH * index]) if needs_weight else None,
            dy.sum(0).to(ctx.dtypes[OF_EACH * index + 1]) if needs_bias else None,
            d_downs[index] if needs_this_down else None,
            d_ups[index] if needs_this_up else None,
        ]
    return None, None if dx is None else dx.view(shape), *found


def _through_layers(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], product: torch.dtype, dtype: torch.dtype
) -> Tensor:
    """The sum of dy_i W_i, in the dtype of x, which autocast may have narrowed."""
    total = None
    for dy, weight in zip(gradients, weights, strict=True):
        if dy is None:
            continue
        dy, weight = rows_of(dy), _in(product, weight)
        if total is None:
            total = _in(dtype, dy @ weight)
        elif total.dtype == dy.dtype:
            total.addmm_(dy, weight)
        else:
            total.add_(dy @ weight)
    return total


def _in(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype is dtype else x.to(dtype)  # to() costs the host something where it does nothing, too
