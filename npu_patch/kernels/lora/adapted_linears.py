"""Linear layers with low-rank adapters that share one input: `y_i = x W_i' + b_i + s drop_i(x) A_i' B_i'`.

The frozen products are torch's, all else is four kernels, however many layers. Kept: x once, as it is given, or what
it can be made of again, h_i of `[T, r]`, and the seed of the masks, a number; no mask, no widened x, no dropped x.
Float32 adapters are multiplied as they are, whatever the dtype of x is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.kernels import launch
from npu_patch.kernels.lora.expand import expand_
from npu_patch.kernels.lora.input_side import add_input_side, rows_are_split_in
from npu_patch.kernels.lora.output_side import sum_ups, through_adapters
from npu_patch.kernels.lora.seed import drawn_seed
from npu_patch.kernels.lora.shrink import shrink
from npu_patch.kernels.partial_sums import sum_rows
from npu_patch.kernels.rows import rows_of
from npu_patch.numerics.remade import Remade
from npu_patch.numerics.results import in_dtype

OF_EACH = 4  # kinds of tensors that a layer brings: weight, bias, A, B


class Group(NamedTuple):
    """What the adapters of a group have in common. `product`: the dtype that their layers multiply in."""

    scaling: float
    dropout: float
    product: torch.dtype


def adapted_linears(
    x: Tensor,
    layers: Sequence[tuple[Tensor, Tensor | None, Tensor, Tensor]],
    group: Group,
    remade: Remade | None = None,
) -> tuple[Tensor, ...]:
    """x `[..., in]`; of each layer a weight `[out, in]`, a bias, A `[r, in]` and B `[out, r]`, all A and B of one dtype
    and rank -> `[..., out]` of each. At most `tiling.MOST` layers. `remade`: how x is made again."""
    weights, biases, downs, ups = zip(*layers, strict=True)
    return _AdaptedLinears.apply(group, remade, x, *weights, *biases, *downs, *ups)


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, remade: Remade | None, x: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        product, shape = group.product, x.shape
        weights, biases, downs, ups = _of_kinds(tensors)
        downs, ups = [each.contiguous() for each in downs], [each.contiguous() for each in ups]
        own = rows_of(in_dtype(product, x))
        seed = drawn_seed(x.device) if group.dropout else None
        h = shrink(own, downs, seed, group.dropout)
        ys = [
            F.linear(own, in_dtype(product, weight), None if bias is None else in_dtype(product, bias))
            for weight, bias in zip(weights, biases, strict=True)
        ]
        expand_(ys, h, ups, group.scaling)
        needed = ctx.needs_input_grad
        needs_x = needed[2]
        needs_weight, _, needs_down, needs_up = [True in each for each in _of_kinds(needed[3:])]
        absent = [None] * len(ys)
        keeps_x = needs_down or needs_weight
        ctx.make, parts = remade if remade is not None and keeps_x else (None, ())
        loaded, ctx.seed = (seed, None) if isinstance(seed, Tensor) else (None, seed)
        ctx.save_for_backward(
            x if keeps_x and not parts else None,
            h if needs_up else None,
            loaded,
            *(weights if needs_x else absent),
            *(downs if needs_x else absent),
            *(ups if needs_x or needs_down else absent),
            *parts,
        )
        ctx.set_materialize_grads(False)
        ctx.group, ctx.like = group, (shape, x.dtype, downs[0].dtype)
        ctx.sizes = downs[0].shape, tuple([up.shape for up in ups])
        if len(shape) == 2:
            return tuple(ys)
        # No views, which could not be changed in place: what torch's own linear returns. It is never compiled.
        return tuple([y.view(*shape[:-1], y.shape[1]).data for y in ys])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        device_type = next(each.device.type for each in gradients if each is not None)
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                return _backward(ctx, gradients)
        return _backward(ctx, gradients)


def _backward(ctx: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    (x, h, loaded, *saved), count, group = ctx.saved_tensors, len(gradients), ctx.group
    weights, downs, ups, parts = _of_kinds(saved, count)
    x = ctx.make(*parts) if parts else x
    reached = [None if dy is None else rows_of(dy) for dy in gradients]
    present = [dy for dy in reached if dy is not None]
    _, _, needs_x, *needed = ctx.needs_input_grad
    if len(present) < count:
        needed = [need and reached[index % count] is not None for index, need in enumerate(needed)]
    needs_weight, needs_bias, needs_down, needs_up = _of_kinds(needed)
    shape, dtype, adapters_dtype = ctx.like
    own: Any = None if x is None else rows_of(in_dtype(group.product, x))
    dx = _through_layers(reached, weights, group.product, dtype) if needs_x else None
    dys = present if len(present) == count else _with_zeros(reached, present[0], ctx.sizes[1])
    needs_adapters = tuple(needs_down), tuple(needs_up)
    seed = ctx.seed if loaded is None else loaded
    sums = _through_adapters(group, dx, own, h, seed, dys, downs, ups, ctx.sizes, needs_adapters, adapters_dtype)
    return (
        None,
        None,
        None if dx is None else dx.view(shape),
        # Autograd casts these to the dtypes of weight and bias.
        *[dy.t() @ own if needs else None for needs, dy in zip(needs_weight, dys, strict=True)],
        *[dy.sum(0) if needs else None for needs, dy in zip(needs_bias, dys, strict=True)],
        *sums,
    )


def _of_kinds(of_all: Sequence[Any], count: int = 0) -> tuple[Sequence[Any], ...]:
    """In four: what there is for each weight, each bias, each A and each B. With a `count`, that of the first three."""
    count = count or len(of_all) // OF_EACH
    return of_all[:count], of_all[count : 2 * count], of_all[2 * count : 3 * count], of_all[3 * count :]


def _with_zeros(reached: list[Tensor | None], like: Tensor, ups: Sequence[torch.Size]) -> list[Tensor]:
    """For an output that nothing used, for the others' sake. Its own layer gets no gradient."""
    rows = like.shape[0]
    return [like.new_zeros(rows, up[0]) if dy is None else dy for dy, up in zip(reached, ups, strict=True)]


def _through_layers(
    reached: Sequence[Tensor | None], weights: Sequence[Tensor], product: torch.dtype, dtype: torch.dtype
) -> Any:
    """The sum of dy_i W_i, in the dtype of x, which autocast may have narrowed."""
    total: Tensor | None = None
    for dy, weight in zip(reached, weights, strict=True):
        if dy is None:
            continue
        weight = in_dtype(product, weight)
        if total is None:
            total = in_dtype(dtype, torch.mm(dy, weight))
        elif total.dtype == dy.dtype:
            total.addmm_(dy, weight)
        else:
            total.add_(torch.mm(dy, weight))
    return total


def _through_adapters(
    group: Group, dx: Tensor | None, own: Tensor | None, h: Any, seed: int | Tensor | None, dys: list[Tensor],
    downs: Sequence[Any], ups: Sequence[Tensor], sizes: tuple[torch.Size, tuple[torch.Size, ...]],
    needs: tuple[tuple[bool, ...], tuple[bool, ...]], dtype: torch.dtype,
) -> Sequence[Tensor | None]:  # fmt: skip
    """Adds to dx what goes through the adapters, and returns the gradients of all A, then of all B: one sum of partial
    sums for all of them."""
    needs_down, needs_up = True in needs[0], True in needs[1]
    (rank, width), rows, device = sizes[0], dys[0].shape[0], dys[0].device
    partial: Tensor | None = None
    length, of_ups, places = _places(*sizes, *needs)
    if length:
        splits = rows_are_split_in(launch.machine_of(device), width, rows, rank)
        partial = torch.empty(splits, length, dtype=torch.float32, device=device)
        if needs_up:
            sum_ups(partial, dys, h, group.scaling)
    if dx is not None or needs_down:
        through = through_adapters(dys, ups, group.scaling / (1.0 - group.dropout))
        rest = None if partial is None or not needs_down else partial[:, of_ups:] if of_ups else partial
        x = own if needs_down else None
        add_input_side(dx, rest, x, through, downs, width, seed, group.dropout, group.product)
    if partial is None:
        return [None] * (2 * len(dys))
    total = partial if dtype == torch.float32 and partial.shape[0] == 1 else sum_rows(partial, dtype)
    return [None if place is None else total.as_strided(*place) for place in places]


Place = tuple[tuple[int, ...], tuple[int, ...], int]


@functools.lru_cache(launch.KEPT)
def _places(
    down: torch.Size, ups: tuple[torch.Size, ...], needs_down: tuple[bool, ...], needs_up: tuple[bool, ...]
) -> tuple[int, int, list[Place | None]]:
    """Of the gradients, side by side: how long all are, how long those of all B, which lie first; then the shape, the
    strides and the place of each A and each B whose own is asked for."""
    sizes_of_ups = [up.numel() if True in needs_up else 0 for up in ups]
    of_ups = sum(sizes_of_ups)
    places: list[Place | None] = []
    for index, needs in enumerate(needs_down):
        places.append((tuple(down), (down[1], 1), of_ups + index * down.numel()) if needs else None)
    for index, (needs, up) in enumerate(zip(needs_up, ups, strict=True)):
        places.append((tuple(up), (up[1], 1), sum(sizes_of_ups[:index])) if needs else None)
    return of_ups + (len(ups) * down.numel() if True in needs_down else 0), of_ups, places
