"""Packages that are not on this machine, with the signatures they publish and the limits they have.

The arithmetic inside is this project's own. `off` multiplies the outputs, to be a provider that is wrong; `rule` is one
of FAULTY_RULES, to be one that is wrong in one way alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch.ops.gated_delta import rule as own_rules
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.causal_conv1d import causal_conv1d as own_convolution


class _OffBackward(torch.autograd.Function):
    """Its argument; a gradient that is off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.3


def _gradient(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
    return own_rule(q, k, _OffBackward.apply(v), *others)


def _packed(*given: Any) -> tuple[Tensor, Tensor | None]:
    """One sequence, whatever the lengths say; shapes are right."""
    q, k, v, g, beta, scale, initial_state, *others, cu_seqlens = given
    if cu_seqlens is None:
        return own_rule(q, k, v, g, beta, scale, initial_state, *others)
    initial_state = None if initial_state is None else initial_state[:1]
    o, final = own_rule(q, k, v, g, beta, scale, initial_state, *others)
    return o, None if final is None else final.expand(len(cu_seqlens) - 1, -1, -1, -1)


def _grouped(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor | None]:
    """Value head h has key head h % Hk."""
    q, k = (x.repeat(1, 1, v.shape[2] // k.shape[2], 1) for x in (q, k))
    return own_rule(q, k, v, *others)


def _final_state(*given: Any) -> tuple[Tensor, Tensor | None]:
    o, final = own_rule(*given)
    return o, None if final is None else final * 1.1


def _final_state_gradient(*given: Any) -> tuple[Tensor, Tensor | None]:
    o, final = own_rule(*given)
    return o, None if final is None else _OffBackward.apply(final)


def _final_state_detached(*given: Any) -> tuple[Tensor, Tensor | None]:
    o, final = own_rule(*given)
    return o, None if final is None else final.detach()


def _initial_state_dropped(*given: Any) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, beta, scale, _, *others = given
    return own_rule(q, k, v, g, beta, scale, None, *others)


def _chunks_forget(*given: Any) -> tuple[Tensor, Tensor | None]:
    """The state is lost after 64 tokens."""
    q, k, v, g, beta, *others = given
    g = torch.where((torch.arange(g.shape[1], device=g.device) == 64)[:, None], -100.0, g)
    return own_rule(q, k, v, g, beta, *others)


FAULTY_RULES: dict[str, Callable[..., Any]] = {
    "gradient": _gradient,
    "packed": _packed,
    "grouped": _grouped,
    "final state": _final_state,
    "final state's gradient": _final_state_gradient,
    "final state detached": _final_state_detached,
    "initial state dropped": _initial_state_dropped,
    "chunks forget": _chunks_forget,
}


def called_as_flas(rule: Callable[..., Any]) -> Callable[..., Any]:
    """One of our own, which takes a `RuleCall`, with the arguments of flash-linear-attention's."""

    def called(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        assert scale is None
        states = initial_state, output_final_state
        return rule(RuleCall(q, k, v, g, beta, *states, use_qk_l2norm_in_kernel, cu_seqlens), **options)

    return called


own_rule = called_as_flas(own_rules.chunk_gated_delta_rule)


def mindspeed_rule(off: float = 1.0) -> Callable[..., Any]:
    """As in MindSpeed core_r0.16.0 to core_r0.18.0."""

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        cu_seqlens: Tensor | None = None,
        chunk_size: int = 64,
        head_first: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if not q.dtype == k.dtype == v.dtype:
            raise ValueError("q, k and v must have the same dtype")
        if q.dtype == torch.float32:
            raise ValueError("ChunkGatedDeltaRuleFunction does not support float32")
        if not q.shape[2] == k.shape[2] == v.shape[2] == g.shape[2] == beta.shape[2]:
            raise ValueError("one number of heads for all")
        if initial_state is not None:
            raise RuntimeError("an initial state in training")
        if cu_seqlens is not None and q.shape[0] != 1:
            raise ValueError("with cu_seqlens the batch must be 1")
        if not all(tensor.is_contiguous() for tensor in (q, k, v, g, beta)) or g.dtype != torch.float32:
            raise ValueError("contiguous tensors, and g in float32")
        chunk_gated_delta_rule.calls += 1
        o, final = own_rule(
            q, k, v, g, beta, scale, None, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens=cu_seqlens
        )
        return o * off, final

    chunk_gated_delta_rule.calls = 0
    return chunk_gated_delta_rule


def fla_rule(off: float = 1.0, rule: Callable[..., Any] = own_rule) -> Callable[..., Any]:
    """As in flash-linear-attention after 0.5.2."""

    def chunk_gated_delta_rule(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        use_beta_sigmoid_in_kernel: bool = False,
        allow_neg_eigval: bool = False,
        state_v_first: bool = False,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        cp_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if q.dtype == torch.float32:
            raise ValueError("float32 is not supported")
        if "head_first" in kwargs or use_beta_sigmoid_in_kernel or allow_neg_eigval or state_v_first:
            raise ValueError("not what transformers means")
        if cu_seqlens is not None and (
            q.shape[0] != 1 or cu_seqlens_cpu is None or cu_seqlens_cpu.device.type != "cpu"
        ):
            raise ValueError("cu_seqlens would be copied to the host in every layer")
        if initial_state is not None and initial_state.dtype != torch.float32:
            raise ValueError("states are float32")
        chunk_gated_delta_rule.calls += 1
        o, final = rule(q, k, v, g, beta, scale, initial_state, output_final_state, use_qk_l2norm_in_kernel, cu_seqlens)
        return o * off, final

    chunk_gated_delta_rule.calls = 0
    return chunk_gated_delta_rule


def fla_convolution(off: float = 1.0) -> Callable[..., Any]:
    def causal_conv1d(
        x: Tensor,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        activation: str | None = None,
        backend: str = "triton",
        cu_seqlens: Tensor | None = None,
        cu_seqlens_cpu: Tensor | None = None,
        chunk_indices: Tensor | None = None,
        cp_context: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x `[B, T, D]`."""
        if weight.shape[0] != x.shape[-1] or activation not in (None, "silu", "swish"):
            raise ValueError("x is [B, T, D], weight [D, W]")
        causal_conv1d.calls += 1
        y = own_convolution(x.transpose(1, 2), weight, bias, activation, cu_seqlens=cu_seqlens)
        return y.transpose(1, 2) * off, None

    causal_conv1d.calls = 0
    return causal_conv1d


def install(monkeypatch: pytest.MonkeyPatch, contents: dict[str, dict[str, Any]]) -> None:
    """Modules by dotted name, with what is in them; their packages too."""
    for name, namespace in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            dotted = ".".join(parts[:depth])
            if dotted not in sys.modules or sys.modules[dotted].__spec__ is not None:
                module = ModuleType(dotted)
                module.__path__ = []
                monkeypatch.setitem(sys.modules, dotted, module)
                if depth > 1:
                    setattr(sys.modules[".".join(parts[: depth - 1])], parts[depth - 1], module)
        vars(sys.modules[name]).update(namespace)


def install_mindspeed(monkeypatch: pytest.MonkeyPatch, module: str, off: float = 1.0) -> Callable[..., Any]:
    rule = mindspeed_rule(off)
    install(monkeypatch, {"mindspeed": {}, f"mindspeed.core.ssm.{module}": {"chunk_gated_delta_rule": rule}})
    return rule


def install_fla(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "0.6.0",
    on_npu: bool = True,
    off: float = 1.0,
    rule: Callable[..., Any] = own_rule,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    rule, convolution = fla_rule(off, rule), fla_convolution(off)
    install(
        monkeypatch,
        {
            "fla": {"__version__": version},
            "fla.utils": {"IS_NPU": on_npu},
            "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": rule},
            "fla.modules.convolution": {"causal_conv1d": convolution},
        },
    )
    return rule, convolution
