"""flash-linear-attention with its Ascend backend (Triton): the chunked rule and the convolution.

0.5.2 is the first release with the backend; gradients and packed sequences were corrected after it. The functions are
taken only where fla itself found an NPU. Its recurrent rule has no Ascend kernel and is left alone.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable

from torch import Tensor

from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall, unsupported_by_kernels
from npu_patch.ops.gated_delta.causal_conv1d import ACTIVATIONS
from npu_patch.serving.implementation import Implementation, is_plain

RULE_NAME, CONVOLUTION_NAME = "fla chunk_gated_delta_rule", "fla causal_conv1d"
RULES, CONVOLUTIONS = "fla.ops.gated_delta_rule", "fla.modules.convolution"
LAST_WITHOUT = (0, 5, 2)  # the corrections that the backend needs came after this release
WIDTHS = (2, 3, 4)


def _missing(module: str, function: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        try:
            fla = importlib.import_module("fla")
        except Exception as error:  # it raises whatever triton raises
            return f"fla cannot be imported: {error}"
        version = str(getattr(fla, "__version__", "of unknown version"))
        numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
        if numbers <= LAST_WITHOUT:
            return f"fla {version} is not newer than {'.'.join(map(str, LAST_WITHOUT))}"
        try:
            on_npu = importlib.import_module("fla.utils").IS_NPU
            getattr(importlib.import_module(module), function)
        except Exception as error:
            return f"fla {version} has no Ascend backend: {type(error).__name__}: {error}"
        return None if on_npu else f"fla {version} found no NPU (fla.utils.IS_NPU is False)"

    return missing


def unsupported_rule(call: RuleCall) -> str | None:
    reason = unsupported_by_kernels(call)
    return f"keys of {call.k.shape[-1]}" if reason is None and call.k.shape[-1] > 256 else reason


def run_rule(call: RuleCall) -> tuple[Tensor, Tensor | None]:
    o, final = sys.modules[RULES].chunk_gated_delta_rule(
        call.q,
        call.k,
        call.v,
        g=call.g.float(),
        beta=call.beta,
        initial_state=None if call.initial_state is None else call.initial_state.float(),
        output_final_state=call.output_final_state,
        use_qk_l2norm_in_kernel=call.normalize,
        **_packed(call),
    )
    return o.to(call.q.dtype), final.float() if call.output_final_state else None


def _packed(call: RuleCall | ConvolutionCall) -> dict[str, Tensor]:
    """Cumulative lengths, and their copy on the host: without it, fla makes one in every layer."""
    if call.cu_seqlens is None:
        return {}
    on_host = {} if call.bounds_on_host is None else {"cu_seqlens_cpu": call.bounds_on_host()}
    return {"cu_seqlens": call.cu_seqlens, **on_host}


def unsupported_convolution(call: ConvolutionCall) -> str | None:
    if not all(map(is_plain, call.tensors)):
        return "tensor subclass"
    if call.seq_idx is not None:
        return "seq_idx: it takes cumulative lengths"
    if call.cu_seqlens is not None and call.x.shape[0] != 1:
        return "cumulative lengths of a batch"
    if call.weight.shape[-1] not in WIDTHS or call.activation not in ACTIVATIONS:
        return f"width {call.weight.shape[-1]}, activation {call.activation}"
    return None


def run_convolution(call: ConvolutionCall) -> Tensor:
    """fla's x is `[B, T, D]`: what the model has before it transposes, so no copy is made."""
    y, _ = sys.modules[CONVOLUTIONS].causal_conv1d(
        call.x.transpose(1, 2), call.weight, call.bias, activation=call.activation, **_packed(call)
    )
    return y.transpose(1, 2).to(call.x.dtype)


RULE = Implementation(RULE_NAME, ("npu",), run_rule, unsupported_rule, _missing(RULES, "chunk_gated_delta_rule"))
CONVOLUTION = Implementation(
    CONVOLUTION_NAME, ("npu",), run_convolution, unsupported_convolution, _missing(CONVOLUTIONS, "causal_conv1d")
)
