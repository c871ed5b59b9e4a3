"""Dropout: _npu_dropout, masks made apart from their use, and dropout with a mask of bytes.

Up to torch_npu 2.9 `torch.nn.functional.dropout` ends in _npu_dropout. Source: op-plugin
(NativeDropoutKernelNpuOpApi.cpp, DropoutGenMaskKernelNpuOpApi.cpp, DropoutWithByteMaskKernelNpu.cpp). A mask of bits
has one bit for each element, the lowest bit of a byte first, 1 = kept, and is filled up to a multiple of 128 bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import rng
from ..refusal import FLOATS, require, require_dtype
from .kernel import Kernel

ALIGNED_BITS, BITS = 128, 8
DRAWN_AT_ONCE = 1 << 24
# Probabilities are rounded to this many steps, so that p and 1 - (1 - p) give one mask.
STEPS = 1 << 20


def draw_kept(elements: int, p: float, seed: int, offset: int) -> Tensor:
    """Which elements are kept, bool [elements]: a function of seed, offset and p, whichever operator asks."""
    generator = rng.cpu_generator(seed, offset)
    dropped = round(p * STEPS) / STEPS
    starts = range(0, elements, DRAWN_AT_ONCE)
    parts = [torch.rand(min(DRAWN_AT_ONCE, elements - start), generator=generator) >= dropped for start in starts]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)


def packed(kept: Tensor) -> Tensor:
    """A mask of bits, uint8 `[ceil(elements / 128) * 16]`."""
    padded = kept.new_zeros(-(-kept.numel() // ALIGNED_BITS) * ALIGNED_BITS)
    padded[: kept.numel()] = kept
    return (padded.view(-1, BITS).to(torch.uint8) << torch.arange(BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def unpacked(mask: Tensor, elements: int) -> Tensor:
    """The inverse of `packed`."""
    return ((mask[:, None] >> torch.arange(BITS, dtype=torch.uint8)) & 1).flatten()[:elements].bool()


def npu_dropout(input: Tensor, p: float, *, draw: Callable[[], tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """`input / (1 - p)` where kept, else 0, and the mask of bits. input: float16, bfloat16 or float32, any shape;
    0 <= p < 1 (torch_npu's dropout handles 1 itself)."""
    name = "_npu_dropout"
    require_dtype(name, "input", input, FLOATS)
    require(0 <= p < 1, name, f"p must be in [0, 1), not {p}")
    kept = draw_kept(input.numel(), p, *draw())
    return _kept_of(input, kept, p), packed(kept)


def npu_dropout_backward(grad_output: Tensor, mask: Tensor, p: float) -> Tensor:
    name = "npu_dropout_backward"
    _check_bits(name, grad_output, mask, p)
    return _kept_of(grad_output, unpacked(mask, grad_output.numel()), p)


def npu_dropout_gen_mask_of(
    input: Tensor,
    size: list[int],
    p: float,
    seed: int,
    offset: int,
    *,
    parallel: bool | None = True,
    sync: bool | None = None,
) -> Tensor:
    """_npu_dropout_gen_mask: the mask of bits for a tensor of `size`, the one that fusion attention draws itself for
    this seed and offset. Of input only the device counts."""
    require(0 <= p <= 1, "_npu_dropout_gen_mask", f"dropout probability has to be between 0 and 1, but got {p}")
    return packed(draw_kept(torch.Size(size).numel(), p, seed, offset))


def npu_dropout_do_mask(input: Tensor, mask: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """`input / (1 - p)` where the mask of bits keeps, else 0; and the mask."""
    _check_bits("npu_dropout_do_mask", input, mask, p)
    return _kept_of(input, unpacked(mask, input.numel()), p), mask


def dropout_with_byte_mask(input: Tensor, p: float, train: bool, *, draw: Callable[[], tuple[int, int]]) -> Tensor:
    """The first result of _dropout_with_byte_mask where train. It has no derivative of its own."""
    if p == 0 or not train:
        return input.clone()
    return torch.zeros_like(input) if p == 1 else draw_byte_mask(input, p, draw=draw)[0]


def draw_byte_mask(input: Tensor, p: float, *, draw: Callable[[], tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """_dropout_with_byte_mask: as _npu_dropout; the mask has a byte for each element, uint8 in input's shape."""
    name = "_dropout_with_byte_mask"
    require_dtype(name, "input", input, FLOATS)
    require(0 <= p < 1, name, f"p must be in [0, 1), not {p}")
    kept = draw_kept(input.numel(), p, *draw())
    return _kept_of(input, kept, p), kept.view(input.shape).to(torch.uint8)


def dropout_with_byte_mask_backward(grad_output: Tensor, mask: Tensor, p: float) -> Tensor:
    name = "_dropout_with_byte_mask_backward"
    require_dtype(name, "grad_output", grad_output, FLOATS)
    require_dtype(name, "mask", mask, (torch.uint8,))
    require(
        mask.shape == grad_output.shape,
        name,
        f"mask {list(mask.shape)} must have the shape of {list(grad_output.shape)}",
    )
    return _kept_of(grad_output, mask.bool(), p)


def _kept_of(input: Tensor, kept: Tensor, p: float) -> Tensor:
    return (input.float() / (1 - p)).masked_fill(~kept.view(input.shape), 0.0).to(input.dtype)


def _check_bits(name: str, input: Tensor, mask: Tensor, p: float) -> None:
    require_dtype(name, "input", input, FLOATS)
    require(0 <= p < 1, name, f"p must be in [0, 1), not {p}")
    check_mask(name, "mask", mask, input.numel())


def check_mask(name: str, argument: str, mask: Tensor, elements: int) -> None:
    length = -(-elements // ALIGNED_BITS) * ALIGNED_BITS // BITS
    require_dtype(name, argument, mask, (torch.uint8,))
    require(
        mask.dim() == 1 and mask.numel() == length,
        name,
        f"{argument} must have a bit for each of {elements} elements, [{length}] bytes, not {list(mask.shape)}",
    )


KERNELS = {
    "_npu_dropout": Kernel(npu_dropout, made_contiguous=("input",), draws=True),
    "npu_dropout_backward": Kernel(npu_dropout_backward, made_contiguous=("grad_output",)),
    "_npu_dropout_gen_mask.Tensor": Kernel(npu_dropout_gen_mask_of),
    "npu_dropout_do_mask": Kernel(npu_dropout_do_mask, made_contiguous=("input",)),
    "dropout_with_byte_mask": Kernel(dropout_with_byte_mask, made_contiguous=("input",), draws=True),
    "_dropout_with_byte_mask": Kernel(draw_byte_mask, made_contiguous=("input",), draws=True),
    "_dropout_with_byte_mask_backward": Kernel(dropout_with_byte_mask_backward, made_contiguous=("grad_output",)),
}
