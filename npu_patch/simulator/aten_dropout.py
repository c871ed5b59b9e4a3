"""`native_dropout`: torch_npu's is `_npu_dropout`, with a bit for each element where other devices have a byte.

Source: op-plugin, NativeDropoutKernelNpuOpApi.cpp.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .refusal import require


def _native_dropout(input: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    if p == 0 or train is False:
        return input.clone(), torch.ones_like(input)
    if p == 1:
        return torch.zeros_like(input), torch.zeros_like(input)
    return torch.ops.npu._npu_dropout(input, p)


def _native_dropout_backward(grad_output: Tensor, mask: Tensor, scale: float) -> Tensor:
    require(scale == 0 or scale >= 1, "native_dropout_backward", f"scale has to be 0 or at least 1, but got {scale}")
    p = 1.0 if scale == 0 else 1 - 1 / scale
    if p == 0:
        return grad_output.clone()
    return torch.zeros_like(grad_output) if p == 1 else torch.ops.npu.npu_dropout_backward(grad_output, mask, p)


KERNELS: dict[str, Callable[..., Any]] = {
    "native_dropout": _native_dropout,
    "native_dropout_backward": _native_dropout_backward,
}
