"""What a gated delta net asks of its ops: one call of each, as every implementation of them takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_patch.serving.implementation import is_plain


@dataclass(frozen=True)
class RuleCall:
    """The gated delta rule; shapes as in rule.py. Returns the output and the final states or None.

    `bounds_on_host()` reads cu_seqlens on the host, at most once per step.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    initial_state: Tensor | None = None
    output_final_state: bool = False
    normalize: bool = False
    cu_seqlens: Tensor | None = None
    bounds_on_host: Callable[[], Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        given = (self.q, self.k, self.v, self.g, self.beta, self.initial_state, self.cu_seqlens)
        return tuple(tensor for tensor in given if tensor is not None)


def unsupported_by_kernels(call: RuleCall) -> str | None:
    """What neither package has a kernel for."""
    if not all(map(is_plain, call.tensors)):
        return "tensor subclass"
    if call.q.dtype not in (torch.bfloat16, torch.float16) or not call.q.dtype == call.k.dtype == call.v.dtype:
        return f"q, k and v of {call.q.dtype}, {call.k.dtype} and {call.v.dtype}: it takes one 16-bit dtype"
    if call.q.shape[1] == 1:
        return "a single token"
    if call.cu_seqlens is not None and call.q.shape[0] != 1:
        return "cumulative lengths of a batch"
    return None


@dataclass(frozen=True)
class ConvolutionCall:
    """The causal convolution of causal_conv1d.py, or with a `state` its update for the next tokens. Returns y."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = None
    seq_idx: Tensor | None = None
    cu_seqlens: Tensor | None = None
    state: Tensor | None = None
    bounds_on_host: Callable[[], Tensor] | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        given = (self.x, self.weight, self.bias, self.seq_idx, self.cu_seqlens, self.state)
        return tuple(tensor for tensor in given if tensor is not None)
