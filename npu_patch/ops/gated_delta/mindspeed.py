"""MindSpeed's chunked gated delta rule (Triton, Ascend).

Its public entry moves with the release line; older lines have none. One number of heads for q, k and v; no float32; no
initial state in training. `mindspeed.core.ssm.gated_delta_net` imports megatron and is left alone, as are its
convolutions: one reads lengths on the host in every layer, the other has no published contract.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

from npu_patch.ops.gated_delta.calls import RuleCall, unsupported_by_kernels
from npu_patch.serving.implementation import Implementation

NAME = "MindSpeed chunk_gated_delta_rule"
FUNCTION = "chunk_gated_delta_rule"
MODULES = (
    "mindspeed.core.ssm.npu_chunk_gated_delta_rule",  # core_r0.17.0, core_r0.18.0; the newest needs the package fla_npu
    "mindspeed.core.ssm.chunk_gated_delta_rule",  # core_r0.16.0
)
PARAMETERS = (
    *("q", "k", "v", "g", "beta"),
    *("initial_state", "output_final_state", "use_qk_l2norm_in_kernel", "cu_seqlens"),
)


def missing() -> str | None:
    try:
        importlib.import_module("mindspeed")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"mindspeed cannot be imported: {error}"
    lacking = None
    for name in MODULES:
        try:
            function = getattr(importlib.import_module(name), FUNCTION)
        except AttributeError:
            continue
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{name}.".startswith(f"{error.name}."):
                lacking = lacking or f"{name} cannot be imported: {error}"
            continue
        except Exception as error:
            return f"{name} cannot be imported: {type(error).__name__}: {error}"
        absent = set(PARAMETERS) - set(inspect.signature(function).parameters)
        return f"{name}.{FUNCTION} takes no {', '.join(sorted(absent))}" if absent else None
    return lacking or f"this MindSpeed has no public {FUNCTION}: its release lines from core_r0.16.0 on have one"


def unsupported(call: RuleCall) -> str | None:
    return "an initial state" if call.initial_state is not None else unsupported_by_kernels(call)


def run(call: RuleCall) -> tuple[Tensor, Tensor | None]:
    heads_per_key = call.v.shape[2] // call.k.shape[2]
    q, k = call.q, call.k
    if heads_per_key > 1:
        q, k = (x.repeat_interleave(heads_per_key, 2) for x in (q, k))
    o, final = _function()(
        q.contiguous(),
        k.contiguous(),
        call.v.contiguous(),
        call.g.float().contiguous(),
        call.beta.contiguous(),
        output_final_state=call.output_final_state,
        use_qk_l2norm_in_kernel=call.normalize,
        cu_seqlens=call.cu_seqlens,
    )
    return o.to(call.q.dtype), final.float() if call.output_final_state else None


def _function() -> Callable[..., Any]:
    return next(getattr(sys.modules[name], FUNCTION) for name in MODULES if name in sys.modules)


RULE = Implementation(NAME, ("npu",), run, unsupported, missing)
