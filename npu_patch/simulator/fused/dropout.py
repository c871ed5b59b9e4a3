"""Dropout: _npu_dropout with its backward. Up to torch_npu 2.9 `torch.nn.functional.dropout` ends here.

Source: op-plugin (NativeDropoutKernelNpuOpApi.cpp). The mask has one bit for each element, the lowest bit of a byte
first, 1 = kept, and is filled up to a multiple of 128 bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import rng
from ..refusal import FLOATS, require, require_dtype
from .kernel import Kernel

ALIGNED_BITS, BITS = 128, 8


def npu_dropout(input: Tensor, p: float, *, draw: Callable[[], tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """`input / (1 - p)` where kept, else 0, and the mask, uint8 `[ceil(elements / 128) * 16]`. input: float16, bfloat16
    or float32, any shape; 0 <= p < 1 (torch_npu's dropout handles 1 itself)."""
    name = "_npu_dropout"
    require_dtype(name, "input", input, FLOATS)
    require(0 <= p < 1, name, f"p must be in [0, 1), not {p}")
    bits = -(-input.numel() // ALIGNED_BITS) * ALIGNED_BITS
    kept = torch.rand(bits, generator=rng.cpu_generator(*draw())) >= p
    mask = (kept.view(-1, BITS).to(torch.uint8) << torch.arange(BITS, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
    return npu_dropout_backward(input, mask, p), mask


def npu_dropout_backward(grad_output: Tensor, mask: Tensor, p: float) -> Tensor:
    kept = (mask[:, None] >> torch.arange(BITS, dtype=torch.uint8)) & 1
    kept = kept.flatten()[: grad_output.numel()].view(grad_output.shape).bool()
    return (grad_output.float() / (1 - p)).masked_fill(~kept, 0.0).to(grad_output.dtype)


KERNELS = {
    "_npu_dropout": Kernel(npu_dropout, made_contiguous=("input",), draws=True),
    "npu_dropout_backward": Kernel(npu_dropout_backward, made_contiguous=("grad_output",)),
}
