"""Who can compute the ops of a gated delta net, in order of preference. The last one is our own and serves every call.

torch_npu's own operators are named and, but for one, declined: where this torch_npu lacks one for that, else for what
its documentation says:

- npu_chunk_gated_delta_rule has no backward, is documented for decays -1 <= g <= 0 (trained models go far below, and
  whether a call does is known only by reading g on the host) and holds states in bfloat16.
- npu_recurrent_gated_delta_rule holds states in bfloat16: it is taken where that is asked for (recurrent.py).
- npu_fused_causal_conv1d is for Ascend 950 and convolutions of width 3; the models have width 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from npu_patch import devices
from npu_patch.ops.gated_delta import fla, mindspeed, recurrent
from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall
from npu_patch.ops.gated_delta.causal_conv1d import ACTIVATIONS, causal_conv1d, causal_conv1d_update
from npu_patch.ops.gated_delta.rule import gated_delta_rule
from npu_patch.serving.implementation import Implementation, is_plain, layout, needs_operators
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

OWN = "torch, float32"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _unsupported_rule(call: RuleCall) -> str | None:
    reason = _unsupported_tensors(call)
    if reason is not None:
        return reason
    q, k, v = call.q, call.k, call.v
    if q.dim() != 4 or v.dim() != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2] or q.numel() == 0:
        return f"q, k and v of shapes that do not fit: {layout(q)}; {layout(k)}; {layout(v)}"
    if v.shape[2] == 0 or v.shape[2] % k.shape[2] or not call.g.shape == call.beta.shape == v.shape[:3]:
        return f"g and beta of shapes that do not fit {v.shape[2]} heads: {layout(call.g)}; {layout(call.beta)}"
    return None


def _run_convolution(call: ConvolutionCall) -> Tensor:
    return causal_conv1d(call.x, call.weight, call.bias, call.activation, call.seq_idx, call.cu_seqlens)


def _run_update(call: ConvolutionCall) -> Tensor:
    assert call.state is not None
    return causal_conv1d_update(call.x, call.state, call.weight, call.bias, call.activation)


def _unsupported_convolution(call: ConvolutionCall) -> str | None:
    reason = _unsupported_tensors(call)
    if reason is not None:
        return reason
    if call.activation not in ACTIVATIONS:
        return f"activation {call.activation}"
    x, weight = call.x, call.weight
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or x.numel() == 0:
        return f"x and weight of shapes that do not fit: {x.dim()} dimensions; {layout(weight)}"
    state = call.state
    if state is not None and (state.shape[:2] != x.shape[:2] or state.shape[2] < weight.shape[1] - 1):
        return f"x and state of shapes that do not fit: {x.dim()} dimensions; {layout(state)}"
    return None


def _unsupported_tensors(call: RuleCall | ConvolutionCall) -> str | None:
    first, *others = call.tensors
    if not all(map(is_plain, call.tensors)):
        return "tensor subclass"
    if first.dtype not in DTYPES:
        return f"{first.dtype}"
    elsewhere = [tensor.device for tensor in others if tensor.device != first.device]
    return f"tensors on {first.device} and {elsewhere[0]}" if elsewhere else None


def _declined(operator: Operator, reason: str) -> Implementation:
    lacking = needs_operators(operator)

    def run(call: Any) -> Any:
        raise NotImplementedError(reason)

    return Implementation(f"torch_npu.{operator.name}", ("npu",), run, lambda call: reason, lambda: lacking() or reason)


def _one_key(call: RuleCall | ConvolutionCall) -> None:
    """Providers prove themselves by kinds of calls, wherever the site is."""


GATED_DELTA_RULE: Op[[RuleCall], tuple[Tensor, Tensor | None]] = Op(
    "gated_delta_rule",
    (
        mindspeed.RULE,
        fla.RULE,
        _declined(
            Operator("npu_chunk_gated_delta_rule"),
            "no backward; documented for -1 <= g only, which cannot be known without reading g; states in bfloat16",
        ),
        Implementation(
            "torch_npu.npu_recurrent_gated_delta_rule",
            ("npu",),
            recurrent.run,
            recurrent.unsupported,
            needs_operators(recurrent.OPERATOR),
            optional=True,
        ),
        Implementation(OWN, devices.TYPES, gated_delta_rule, _unsupported_rule),
    ),
    _one_key,
    gated_delta_rule,
)
CAUSAL_CONV1D: Op[[ConvolutionCall], Tensor] = Op(
    "causal_conv1d",
    (
        fla.CONVOLUTION,
        _declined(Operator("npu_fused_causal_conv1d"), "Ascend 950 and width 3 only, no backward"),
        Implementation(OWN, devices.TYPES, _run_convolution, _unsupported_convolution),
    ),
    _one_key,
    _run_convolution,
)
CAUSAL_CONV1D_UPDATE: Op[[ConvolutionCall], Tensor] = Op(
    "causal_conv1d_update",
    (
        _declined(Operator("npu_fused_causal_conv1d"), "Ascend 950 and width 3 only"),
        Implementation(OWN, devices.TYPES, _run_update, _unsupported_convolution),
    ),
    _one_key,
    _run_update,
)
