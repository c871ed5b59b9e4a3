"""SwiGLU: `silu(gate) * up` (https://arxiv.org/abs/2002.05202).

`npu_swiglu` takes gate and up as the two halves of one tensor. A feed-forward layer with one gate_up projection has
that tensor; one with two projections must concatenate first. For I elements in gate: values moved, in how many
kernel launches, and values kept for the backward (counted by scripts/count_swiglu.py on the simulated NPU):

    silu and mul                  forward 5 I in 2    backward 9 I in 3    keeps 3 I
    concatenate and npu_swiglu    forward 7 I in 2    backward 5 I in 1    keeps 2 I

The gradients of gate and up are then halves of one tensor. A consumer that first copies them to be contiguous makes
the second backward 9 I in 3: still fewer launches and values kept than the first, for 16 I against 14 I moved.

So two projections are concatenated where a backward will follow, and left to silu and mul where none will.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.implementation import Implementation, is_plain, needs_operators

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def swiglu(kernel: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up for two tensors of the same shape `[..., I]`, rounded once."""
    return kernel(torch.cat((gate, up), -1))


def swiglu_of_halves(kernel: Callable[[Tensor], Tensor], gate_up: Tensor) -> Tensor:
    """silu of the first half times the second: `[..., 2 I]` to `[..., I]`, rounded once."""
    return kernel(gate_up)


def reference(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _npu_swiglu(gate_up: Tensor) -> Tensor:
    # Operator documentation: non-contiguous tensors are not supported.
    return torch.ops.npu.npu_swiglu(gate_up.contiguous(), dim=-1)


def _torch_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, -1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def _unsupported(*tensors: Tensor) -> str | None:
    """For gate and up, or for gate_up alone. Limits of npu_swiglu (operator documentation): 1 to 8 dimensions, none
    empty, an even last one."""
    first = tensors[0]
    for tensor in tensors:
        if not is_plain(tensor):
            return "tensor subclass"
        if tensor.dtype not in FLOAT_DTYPES or tensor.dtype != first.dtype or tensor.shape != first.shape:
            return f"gate and up of dtypes and shapes {[(str(t.dtype), tuple(t.shape)) for t in tensors]}"
        if tensor.numel() == 0 or tensor.dim() > 8:
            return f"{tensor.numel()} elements in {tensor.dim()} dimensions"
    if len(tensors) == 1 and first.shape[-1] % 2:
        return f"an odd last dimension {first.shape[-1]}"
    return None


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("torch_npu.npu_swiglu", ("npu",), _npu_swiglu, _unsupported, needs_operators("npu_swiglu")),
    Implementation("torch, float32", ("cuda", "cpu"), _torch_swiglu, _unsupported),
)
