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
from npu_patch.numerics.results import in_dtype

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
    def forward(ctx: Any, group: Group, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        weights, biases = tensors[0::OF_EACH], tensors[1::OF_EACH]
        downs, ups = ([each.contiguous() for each in tensors[index::OF_EACH]] for index in (2, 3))
        own = rows_of(in_dtype(group.product, x))
        seed = torch.randint(LARGEST_SEED, (1,), device=x.device) if group.dropout else None
        h = shrink(own, downs, seed, group.dropout)
        ys = [
            F.linear(own, in_dtype(group.product, weight), None if bias is None else in_dtype(group.product, bias))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        expand_(ys, h, ups, group.scaling)
        _, needs_x, *needed = ctx.needs_input_grad
        needs_weight, needs_down, needs_up = (any(needed[index::OF_EACH]) for index in (0, 2, 3))
        ctx.save_for_backward(
            x if needs_down or needs_weight else None,
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
    (x, h, seed, *saved), count, group = ctx.saved_tensors, len(gradients), ctx.group
    weights, downs, ups = saved[:count], saved[count : 2 * count], saved[2 * count :]
    _, needs_x, *needed = ctx.needs_input_grad
    needs = [need and gradients[index // OF_EACH] is not None for index, need in enumerate(needed)]
    own: Any = None if x is None else rows_of(in_dtype(group.product, x))
    dys = _all_rows(gradients, ctx.shapes[1])
    shape, dtype = ctx.like
    dx = _through_layers(gradients, weights, group.product, dtype) if needs_x else None
    needs_adapters = any(needs[2::OF_EACH]), any(needs[3::OF_EACH])
    sums = _through_adapters(group, dx, own, h, seed, dys, downs, ups, ctx.shapes, needs_adapters, ctx.dtypes[2])
    found: list[Tensor | None] = []
    for index, (dy, d_down, d_up) in enumerate(zip(dys, *sums, strict=True)):
        needs_weight, needs_bias, needs_down, needs_up = needs[OF_EACH * index :][:OF_EACH]
        found += [
            in_dtype(ctx.dtypes[OF_EACH * index], dy.t() @ own) if needs_weight else None,
            in_dtype(ctx.dtypes[OF_EACH * index + 1], dy.sum(0)) if needs_bias else None,
            d_down if needs_down else None,
            d_up if needs_up else None,
        ]
    return None, None if dx is None else dx.view(shape), *found


def _all_rows(gradients: Sequence[Tensor | None], ups: Sequence[torch.Size]) -> list[Tensor]:
    """As `[T, out]`: zeros for an output that nothing used, for the others' sake. Its own layer gets no gradient."""
    like = next(dy for dy in gradients if dy is not None)
    rows = like.numel() // like.shape[-1]
    return [
        like.new_zeros(rows, shape[0]) if dy is None else rows_of(dy) for dy, shape in zip(gradients, ups, strict=True)
    ]


def _through_layers(
    gradients: Sequence[Tensor | None], weights: Sequence[Tensor], product: torch.dtype, dtype: torch.dtype
) -> Any:
    """The sum of dy_i W_i, in the dtype of x, which autocast may have narrowed."""
    total: Tensor | None = None
    for dy, weight in zip(gradients, weights, strict=True):
        if dy is None:
            continue
        dy, weight = rows_of(dy), in_dtype(product, weight)
        if total is None:
            total = in_dtype(dtype, dy @ weight)
        elif total.dtype == dy.dtype:
            total.addmm_(dy, weight)
        else:
            total.add_(dy @ weight)
    return total


def _through_adapters(
    group: Group, dx: Tensor | None, own: Tensor | None, h: Any, seed: Tensor | None, dys: list[Tensor],
    downs: list[Any], ups: list[Tensor], shapes: tuple[list[torch.Size], list[torch.Size]],
    needs: tuple[bool, bool], dtype: torch.dtype,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:  # fmt: skip
    """Adds to dx what goes through the adapters, and returns the gradients of all A and of all B: one sum of partial
    sums for all of them."""
    needs_down, needs_up = needs
    (down_shapes, up_shapes), rows = shapes, dys[0].shape[0]
    rank, width = down_shapes[0]
    of_downs, of_ups = down_shapes if needs_down else [], up_shapes if needs_up else []
    sizes = [shape.numel() for shape in (*of_ups, *of_downs)]
    splits = rows_are_split_in(width, rows, rank, dys[0].device)
    partial = torch.empty(splits, sum(sizes), dtype=torch.float32, device=dys[0].device) if sizes else None
    if partial is not None and needs_up:
        sum_ups(partial, dys, h, group.scaling)
    if dx is not None or needs_down:
        through = through_adapters(dys, ups, group.scaling / (1.0 - group.dropout))
        rest = partial[:, sum(sizes[: len(of_ups)]) :] if partial is not None and needs_down else None
        x = own if needs_down else None
        add_input_side(dx, rest, x, through, downs, width, seed, group.dropout, group.product)
    absent = [None] * len(dys)
    if partial is None:
        return absent, absent
    parts = sum_rows(partial, dtype).split(sizes)
    found = [part.view(shape) for part, shape in zip(parts, (*of_ups, *of_downs), strict=True)]
    return (found[len(of_ups) :] if needs_down else absent), (found[: len(of_ups)] if needs_up else absent)
