"""SwiGLU: `silu(gate) * up` (https://arxiv.org/abs/2002.05202).

`npu_swiglu` takes gate and up as the two halves of one tensor. A feed-forward layer with one gate_up projection has
that tensor; one with two projections must concatenate first. For I elements in gate: values moved, in how many
kernel launches, and values kept for the backward (counted by scripts/count_swiglu.py on the simulated NPU):

    silu and mul                  forward 5 I in 2    backward 9 I in 3    keeps 3 I
    concatenate and npu_swiglu    forward 7 I in 2    backward 5 I in 1    keeps 2 I

The gradients of gate and up are then halves of one tensor. A consumer that first copies them to be contiguous makes
the second backward 9 I in 3: still fewer launches and values kept than the first, for 16 I against 14 I moved.

Two projections are concatenated whether a backward follows or not: silu and mul round twice, and the log-probabilities
of a policy and of its reference, or of a layer and of its recomputation, would differ. Without a backward that is 7 I
moved against 5 I, in as many launches. The Triton kernel takes them as they are: forward 3 I in 1, backward 5 I in 1,
keeps 2 I.

A call is gate and up `[..., I]`, or gate_up `[..., 2 I]` alone, for `silu(gate) * up` `[..., I]`, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    FLOAT_DTYPES,
    TRITON,
    Implementation,
    dtype_name,
    is_plain,
    layout,
    needs_operators,
    needs_triton,
)
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

NPU_SWIGLU = Operator("npu_swiglu", ("dim",), gradient=True)


def reference(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def _key(gate: Tensor, up: Tensor | None = None) -> Hashable:
    return gate.shape[-1], gate.dtype


def _npu_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    gate_up = gate if up is None else torch.cat((gate, up), -1)
    # Operator documentation: non-contiguous tensors are not supported.
    return torch.ops.npu.npu_swiglu(gate_up.contiguous(), dim=-1)


class _TorchSwiGLU(torch.autograd.Function):
    """In float32. Keeps gate and up as they are given: autograd would keep float32 copies of both, and of silu."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate.float()) * up.float()).to(gate.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        gate, up = ctx.saved_tensors
        needs_gate, needs_up = ctx.needs_input_grad
        dy, wide = dy.float(), gate.float()
        d_gate = torch.ops.aten.silu_backward(dy * up.float(), wide).to(gate.dtype) if needs_gate else None
        return d_gate, ((dy * F.silu(wide)).to(up.dtype) if needs_up else None)


def torch_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    return _TorchSwiGLU.apply(*(gate.chunk(2, -1) if up is None else (gate, up)))


def _triton_swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    from npu_patch.kernels.swiglu import swiglu

    assert up is not None, "gate and up in one tensor are not served"
    return swiglu(gate, up)


def _unsupported(gate: Tensor, up: Tensor | None = None) -> str | None:
    """Limits of npu_swiglu (operator documentation): 1 to 8 dimensions, none empty, an even last one."""
    reason = _unsupported_tensors(gate, up)
    if reason is None and up is None and gate.shape[-1] % 2:
        return f"an odd last dimension {gate.shape[-1]}"
    return reason


def _unsupported_triton(gate: Tensor, up: Tensor | None = None) -> str | None:
    if up is None:
        return "gate and up in one tensor, as npu_swiglu takes them"
    if gate.device != up.device:
        return f"gate on {gate.device}, up on {up.device}"
    reason = _unsupported_tensors(gate, up)
    if reason is None and (gate.stride(-1) != 1 or up.stride(-1) != 1):
        return "a last dimension that is not contiguous"
    return reason


def _unsupported_tensors(gate: Tensor, up: Tensor | None) -> str | None:
    dtype, shape = gate.dtype, gate.shape
    if not is_plain(gate) or not (up is None or is_plain(up)):
        return "tensor subclass"
    if dtype not in FLOAT_DTYPES or not (up is None or (up.dtype == dtype and up.shape == shape)):
        given = [gate] if up is None else [gate, up]
        return f"gate and up of dtypes and shapes: {' and '.join(f'{t.dtype}, {layout(t)}' for t in given)}"
    return layout(gate) if gate.numel() == 0 or len(shape) > 8 else None


SWIGLU = Op(
    "swiglu",
    (
        Implementation(TRITON, ACCELERATORS, _triton_swiglu, _unsupported_triton, needs_triton, optional=True),
        Implementation("torch_npu.npu_swiglu", ("npu",), _npu_swiglu, _unsupported, needs_operators(NPU_SWIGLU)),
        Implementation("torch, float32", ("cuda", "cpu"), torch_swiglu, _unsupported),
    ),
    _key,
    reference,
)


def kept_for_the_backward(implementation: Implementation, *call: Tensor) -> tuple[Tensor, ...] | None:
    """What to call `implementation` with in place of `call`, for the same result, of which it keeps just these tensors;
    None where it keeps others."""
    if implementation.name == TRITON:
        return call
    if implementation.run is _npu_swiglu:
        return (torch.cat(call, -1).contiguous() if len(call) == 2 else call[0].contiguous(),)
    return None


def case(width: int, dtype: torch.dtype, in_one: bool = False) -> Case:
    """gate and up `[tokens, width]` of one dtype; `in_one`: gate_up `[tokens, width]`, half of it gate."""

    def call(function: Callable[..., Any], *gate_and_up: Tensor) -> Any:
        return function(*gate_and_up)

    return Case(
        SWIGLU,
        f"{width} {dtype_name(dtype)}{', in one' if in_one else ''}",
        lambda tokens: [((tokens, width), dtype)] * (1 if in_one else 2),
        call,
    )
