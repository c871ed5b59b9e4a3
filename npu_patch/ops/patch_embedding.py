"""Patches of images and videos, embedded: a convolution whose kernel is its stride (https://arxiv.org/abs/2010.11929).

No two windows overlap, so it is a product: of each patch, flattened, with the kernels as the rows of a matrix, which
they are in memory. Where a call brings one patch each (Qwen2-VL: `[N, C, T, P, P]`) they are flat already, and there is
one launch; of whole images the patches are copied out and the products copied back to channels first.

Which is faster depends on the release of CANN: the product was, by much, until there was a Conv3d of its own, by which
2.5 ms stand against 6.9 (https://github.com/vllm-project/vllm-ascend/pull/7017). So it has to be measured.

A call is x `[B, C, *sizes]`, weight `[E, C, *kernel]` and bias `[E]` or None, for `[B, E, *counts]`, contiguous. What
is left of a size beyond the last whole patch does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Alternative, Case
from npu_patch.serving.implementation import FLOAT_DTYPES, Implementation, dtype_name, is_plain, layout
from npu_patch.serving.op import Op

CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {4: F.conv2d, 5: F.conv3d}  # by the dimensions of the weight
IMAGES, PATCHES = 2, 1024  # of a case of whole images, and of one image as it is timed
TIMED_APART = 4096  # patches in a call of one each: a few images


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return CONVOLUTIONS[weight.dim()](x, weight, bias, stride=weight.shape[2:])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel, rows = weight.shape[2:], weight.flatten(1)
    if x.shape[2:] == kernel:
        return F.linear(x.flatten(1), rows, bias).view(len(x), -1, *[1] * len(kernel))
    counts = [size // width for size, width in zip(x.shape[2:], kernel, strict=True)]
    for axis, (count, width) in enumerate(zip(counts, kernel, strict=True)):
        if x.shape[2 * axis + 2] != count * width:
            x = x.narrow(2 * axis + 2, 0, count * width)
        x = x.unflatten(2 * axis + 2, (count, width))
    axes = range(2, x.dim(), 2)
    patches = x.permute(0, *axes, 1, *(axis + 1 for axis in axes)).reshape(-1, rows.shape[1])
    return F.linear(patches, rows, bias).view(len(x), *counts, -1).movedim(-1, 1).contiguous()


def _unsupported(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    given = (x, weight) if bias is None else (x, weight, bias)
    if not all(map(is_plain, given)):
        return "tensor subclass"
    if x.dtype not in FLOAT_DTYPES or any(each.dtype != x.dtype or each.device != x.device for each in given):
        return f"input, weight and bias of {', '.join(f'{each.dtype} on {each.device.type}' for each in given)}"
    if x.dim() != weight.dim() or x.dim() not in CONVOLUTIONS or x.numel() == 0:
        return f"an input of {layout(x)}, for kernels of {weight.dim() - 2} dimensions"
    sizes, kernel = x.shape[2:], weight.shape[2:]
    if x.shape[1] != weight.shape[1] or any(size < width for size, width in zip(sizes, kernel, strict=True)):
        return f"no whole patch: {x.shape[1]} channels of {tuple(sizes)}, kernels of {tuple(weight.shape[1:])}"
    return None if weight.is_contiguous() else "a weight that is not contiguous"


def _key(x: Tensor, weight: Tensor, bias: Tensor | None) -> Hashable:
    return tuple(weight.shape), bias is None, x.dtype, x.shape[2:] == weight.shape[2:]


PATCH_EMBEDDING = Op(
    "patch_embedding",
    (Implementation("torch.nn.functional.linear", ACCELERATORS, _product, _unsupported, optional=True),),
    _key,
    convolution,
)
_ORIGINAL = Alternative("the convolution", convolution)


def cases(shape: Sequence[int], with_bias: bool, dtype: torch.dtype) -> Iterator[Case]:
    """Of a weight of this shape, for both kinds of input: who calls it is not known before it is called."""
    for apart in (True, False):
        yield _case(tuple(shape), with_bias, dtype, apart)


def _case(shape: tuple[int, ...], with_bias: bool, dtype: torch.dtype, apart: bool) -> Case:
    (embedded, channels), kernel = shape[:2], shape[2:]

    def inputs(patches: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """`patches`: in all, or in each image; a video has twice as many."""
        rows = next(each for each in range(int(patches**0.5), 0, -1) if patches % each == 0)
        counts = (*(2 for _ in kernel[2:]), rows, patches // rows)
        sizes = kernel if apart else tuple(count * width for count, width in zip(counts, kernel, strict=True))
        given = [(patches if apart else IMAGES, channels, *sizes), shape, *([(embedded,)] if with_bias else [])]
        return [(each, dtype) for each in given]

    def call(function: Callable[..., Any], x: Tensor, weight: Tensor, *bias: Tensor) -> Any:
        return function(x, weight, *bias or (None,))

    of = " x ".join(map(str, shape[1:]))
    return Case(
        PATCH_EMBEDDING,
        f"{'patches' if apart else 'images'}, {embedded} of {of}{', bias' if with_bias else ''}, {dtype_name(dtype)}",
        inputs,
        call,
        original=_ORIGINAL,
        allowed=ALLOWED_OF_PRODUCTS,
        timed_tokens=TIMED_APART if apart else PATCHES,
    )
