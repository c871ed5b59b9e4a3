"""What takes the place of the functions of a gated delta net, and what it does about packed sequences."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall
from npu_patch.ops.gated_delta.recorded import note, part, recorded, recording_of
from npu_patch.patches.gated_delta.packing import refuse_if_untold
from npu_patch.probe.gated_delta import CONVOLUTION, RULE, UPDATE, Reading
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Dispatch
from npu_patch.serving.listeners import listener_to_all
from npu_patch.serving.once_per_step import OncePerTensor
from npu_patch.serving.replacement import Unserved

# Arguments of the packages' functions that change the result. transformers passes none of them; of others that come
# along from a model's own keyword arguments (use_cache, max_length_q, ...) the originals take no notice either.
MEANINGFUL = (
    "scale",
    "head_first",
    "gk",
    "gv",
    "state_v_first",
    "cp_context",
    "A_log",
    "dt_bias",
    "use_gate_in_kernel",
    "use_beta_sigmoid_in_kernel",
    "allow_neg_eigval",
    "initial_states",
    "return_final_states",
    "final_states_out",
    "cache_seqlens",
    "conv_state_indices",
)
BOUNDARIES = ("seq_idx", "cu_seqlens", "cu_seq_lens_q")
_BOUNDS_ON_HOST = OncePerTensor()


def serve(
    reading: Reading,
    dispatch: Dispatch,
    device_type: str,
    calls: Calls,
    why_not: Callable[[torch.nn.Module], str | None] | None = None,
) -> Callable[..., Any]:
    """`serve` for `replacement_for`, of a function that computes what `reading` says; with `why_not`, of a method,
    whose layer comes first and is asked."""
    call_of = {RULE: _rule_call, CONVOLUTION: _convolution_call, UPDATE: _update_call}[reading.kind]

    def serve_call(*args: Any, **kwargs: Any) -> Any:
        reason = None
        if why_not is not None:
            reason, args = why_not(args[0]), args[1:]
        given = _bound(reading, args, kwargs) if reason is None else Unserved(reason)
        if reading.kind != UPDATE and not any(kwargs.get(name) is not None for name in BOUNDARIES):
            refuse_if_untold(reading.kind)
        result = given if isinstance(given, Unserved) else _served(given)
        if isinstance(result, Unserved):
            _refuse_to_leak(reading, kwargs, result.reason)
        return result

    def _served(given: Mapping[str, Any]) -> Any:
        leading = given.get("q") if reading.kind == RULE else given.get("x")
        if not isinstance(leading, Tensor) or leading.device.type != device_type:
            return Unserved(f"input on {getattr(leading, 'device', 'no device')}")
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        unusual = [name for name in MEANINGFUL if given.get(name) is not None and given[name] is not False]
        if unusual:
            return Unserved(f"{', '.join(unusual)} given")
        if reading.kind != RULE and given.get("activation") not in reading.activations:
            return Unserved(f"activation {given.get('activation')}")
        heard = None if reading.kind == RULE else listener_to_all()  # its activation may be a module made at every call
        if heard is not None:
            return Unserved(heard)
        call = call_of(given, leading.device)
        if call is None:
            return Unserved("arguments that are no tensors")
        return _computed(dispatch, calls, call)

    return serve_call


def _computed(dispatch: Dispatch, calls: Calls, call: Any) -> Any:
    recording = recording_of(call.initial_state) if isinstance(call, RuleCall) else None
    serving = dispatch.serving(calls, call if recording is None else part(call, 0, call.initial_state))
    if isinstance(serving, str):
        return Unserved(serving)
    with unseen():  # the package's own ones write into what they computed
        if recording is not None:
            return recorded(call, recording, serving)
        result = serving.run(call)
    if isinstance(call, RuleCall):
        note(result[1])
    return result


def _bound(reading: Reading, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any] | Unserved:
    """The arguments by the names of the op."""
    if len(args) > len(reading.names):
        return Unserved("more arguments than it has parameters")
    given = dict(zip(reading.names, args, strict=False))
    for name, value in kwargs.items():
        given.setdefault(reading.spellings.get(name, name), value)
    return given


def _rule_call(given: Mapping[str, Any], device: torch.device) -> RuleCall | None:
    leading: list[Any] = [given.get(name) for name in ("q", "k", "v", "g", "beta")]
    if not all(isinstance(tensor, Tensor) for tensor in leading):
        return None
    q, k, v, g, beta = leading
    cu_seqlens = _cumulative_lengths(given, device)
    return RuleCall(
        q,
        k,
        v,
        g,
        beta,
        initial_state=given.get("initial_state"),
        output_final_state=bool(given.get("output_final_state")),
        normalize=bool(given.get("use_qk_l2norm_in_kernel")),
        cu_seqlens=cu_seqlens,
        bounds_on_host=_on_host(cu_seqlens),
    )


def _convolution_call(given: Mapping[str, Any], device: torch.device) -> ConvolutionCall | None:
    if not isinstance(given.get("weight"), Tensor):
        return None
    seq_idx = given.get("seq_idx")
    cu_seqlens = _cumulative_lengths(given, device) if seq_idx is None else None
    return ConvolutionCall(
        given["x"],
        given["weight"],
        given.get("bias"),
        given.get("activation"),
        seq_idx,
        cu_seqlens,
        bounds_on_host=_on_host(cu_seqlens),
    )


def _update_call(given: Mapping[str, Any], device: torch.device) -> ConvolutionCall | None:
    if not all(isinstance(given.get(name), Tensor) for name in ("weight", "conv_state")):
        return None
    return ConvolutionCall(
        given["x"], given["weight"], given.get("bias"), given.get("activation"), state=given["conv_state"]
    )


def _cumulative_lengths(given: Mapping[str, Any], device: torch.device) -> Tensor | None:
    """Of two sequences or more; `cu_seq_lens_q` is what transformers' data collator calls them."""
    lengths = given.get("cu_seqlens")
    lengths = given.get("cu_seq_lens_q") if lengths is None else lengths
    return None if lengths is None or lengths.shape[0] <= 2 else lengths.to(device)


def _on_host(cu_seqlens: Tensor | None) -> Callable[[], Tensor] | None:
    return None if cu_seqlens is None else lambda: _BOUNDS_ON_HOST.of((cu_seqlens,), cu_seqlens.cpu)


def _refuse_to_leak(reading: Reading, kwargs: Mapping[str, Any], reason: str) -> None:
    """The original is about to be called. Given the boundaries of packed sequences, does it keep them apart?"""
    lengths = kwargs.get("cu_seqlens")
    if reading.kind == UPDATE:
        return
    seen = kwargs.get("seq_idx") is not None or (lengths is not None and lengths.shape[0] > 2)
    others = kwargs.get("cu_seq_lens_q")
    overlooked = not seen and others is not None and others.shape[0] > 2
    if (seen and reading.leaks) or overlooked:
        raise ValueError(
            f"packed sequences would leak into each other: npu_patch does not serve this {reading.kind} ({reason}), "
            "and transformers' own does not look at their boundaries"
        )
