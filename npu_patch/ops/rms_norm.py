"""RMSNorm over the last dimension: `y = x / sqrt(mean(x²) + eps) * gamma` (https://arxiv.org/abs/1910.07467).

Modeling files write this in about ten ways. They differ in what gamma is (weight, 1 + weight, none), in where they
round to half precision, in the dtype they return when weight and input differ, and in a gate that may follow. The
references below round where those ways round, so a probe can tell them apart. `normalize` computes any of them with
one kernel that works in float32 and rounds once: no further from the exact result than any of them. The Triton kernel
does the gate and `1 + weight` too, in the same launch.

A call is `(variant, x, weight, eps, gate, gate_in_float32)`, x `[..., D]`, weight `[D]` or None, and for gated variants
gate `[..., D]`, else None.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from npu_patch.devices import ACCELERATORS
from npu_patch.kernels.gamma import ACTIVATIONS, GAMMAS, NONE, ONE_PLUS_WEIGHT, ROUNDED_ONE_PLUS_WEIGHT, WEIGHT, Gamma
from npu_patch.numerics.autograd import Context
from npu_patch.numerics.results import changeable
from npu_patch.ops.swiglu import NPU_SWIGLU
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    FLOAT_DTYPES,
    HALF_DTYPES,
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

CASE_EPS = 1e-6
NPU_RMS_NORM = Operator("npu_rms_norm", ("epsilon",), gradient=True)
GEMMA = Operator("npu_gemma_rms_norm", ("epsilon",))  # _OfOnePlusWeight is its derivative
# By `RMSNormVariant.output`, from the dtypes of input and weight.
OUTPUT_DTYPES: dict[str, Callable[[torch.dtype, torch.dtype], torch.dtype]] = {
    "input": lambda x, weight: x,
    "promoted": torch.promote_types,
    "weight": lambda x, weight: weight,
}


@dataclass(frozen=True)
class RMSNormVariant:
    """A function that RMSNorm modules compute.

    `gamma`: how it uses its weight. `output`: whose dtype is returned, "input", "promoted" (of input and weight) or
    "weight". `gate`: the activation of the gate that multiplies the norm, or None.
    `rounds_before_gate`: the norm is rounded to the input's dtype before the gate multiplies it.
    `reference(x, weight, eps)` or `reference(x, weight, eps, gate)` is the original's arithmetic in plain torch.
    """

    name: str
    gamma: Gamma
    output: str
    reference: Callable[..., Tensor]
    gate: Callable[[Tensor], Tensor] | None = None
    rounds_before_gate: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.gamma, Gamma):
            known = ", ".join(gamma.name for gamma in GAMMAS)
            raise ValueError(f"RMSNorm {self.name!r}: gamma is {self.gamma!r}; accepted is a Gamma, as of {known}")
        if self.output not in OUTPUT_DTYPES:
            accepted = ", ".join(OUTPUT_DTYPES)
            raise ValueError(f"RMSNorm {self.name!r}: output is {self.output!r}; accepted are {accepted}")

    def output_dtype(self, x: Tensor, weight: Tensor | None) -> torch.dtype:
        return x.dtype if weight is None else OUTPUT_DTYPES[self.output](x.dtype, weight.dtype)

    def exact(self, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None, *_: Any) -> Tensor:
        """The definition, which rounds nowhere: for float64."""
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        gamma = self.gamma.value(weight)
        y = y if gamma is None else y * gamma
        if gate is None:
            return y
        assert self.gate is not None
        return y * self.gate(gate)


def normalize(
    kernel: Callable[[Tensor, Tensor | None, float], Tensor],
    variant: RMSNormVariant,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None = None,
    gate_in_float32: bool = False,
    gated_in_one: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """`variant` of x `[..., D]` and weight `[D]` (or None), with gate `[..., D]` for gated variants, by a kernel for
    norms alone. `gated_in_one(y, gate)`: `y * silu(gate)` of one half precision, rounded once.

    `gate_in_float32` keeps a gated norm in float32 up to the last rounding; variants whose original does so are
    always computed so.
    """
    gamma = variant.gamma.value(weight)
    output_dtype = variant.output_dtype(x, weight)
    gated = variant.gate is not None
    if output_dtype != x.dtype or (gated and (gate_in_float32 or not variant.rounds_before_gate)):
        x = x.float()  # the kernel returns the dtype of x: a half precision x would round to the wrong one first
    if gamma is not None and gamma.dtype not in (x.dtype, torch.float32):
        gamma = gamma.float()  # the operator takes gamma in the dtype of x or, beside half precision, in float32
    y = kernel(x, gamma, eps)
    if variant.gate is not None:
        assert gate is not None
        if (
            gated_in_one is not None
            and variant.gate is F.silu
            and y.dtype == gate.dtype == output_dtype != torch.float32
        ):
            return gated_in_one(y, gate)
        y = y * variant.gate(gate.float())
    return y if y.dtype == output_dtype else y.to(output_dtype)


def _normalized(x: Tensor, eps: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def _in_weight_dtype(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normalized = _normalized(x, eps)
    return weight * (normalized.to(weight.dtype) if weight.dtype in HALF_DTYPES else normalized)


def _rounded_scale(x: Tensor, weight: None, eps: float) -> Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps).to(x.dtype)


PLAIN_VARIANTS: tuple[RMSNormVariant, ...] = (
    RMSNormVariant("weight", WEIGHT, "promoted", lambda x, weight, eps: weight * _normalized(x, eps).to(x.dtype)),
    RMSNormVariant(
        "float32 weight", WEIGHT, "input", lambda x, weight, eps: (weight.float() * _normalized(x, eps)).to(x.dtype)
    ),
    RMSNormVariant(
        "1 + weight",
        ONE_PLUS_WEIGHT,
        "input",
        lambda x, weight, eps: (_normalized(x, eps) * (1.0 + weight.float())).to(x.dtype),
    ),
    RMSNormVariant(
        "rounded 1 + weight",
        ROUNDED_ONE_PLUS_WEIGHT,
        "input",
        lambda x, weight, eps: (_normalized(x, eps) * (1.0 + weight).float()).to(x.dtype),
    ),
    RMSNormVariant("weightless", NONE, "input", lambda x, weight, eps: _normalized(x, eps).to(x.dtype)),
    RMSNormVariant("weightless, rounded scale", NONE, "input", _rounded_scale),
    RMSNormVariant("weight, in the weight's dtype", WEIGHT, "weight", _in_weight_dtype),
)

GATE_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}
KERNELS_ACTIVATIONS = {GATE_ACTIVATIONS.get(name): name for name in ACTIVATIONS}


def _gated(name: str, activation: Callable[[Tensor], Tensor], rounds_before_gate: bool) -> RMSNormVariant:
    def reference(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
        normalized = _normalized(x, eps)
        y = weight * normalized.to(x.dtype) if rounds_before_gate else weight.float() * normalized
        return (y * activation(gate.float())).to(x.dtype)

    how = "weight" if rounds_before_gate else "float32 weight"
    return RMSNormVariant(f"{how}, gated by {name}", WEIGHT, "input", reference, activation, rounds_before_gate)


GATED_VARIANTS: tuple[RMSNormVariant, ...] = tuple(
    _gated(name, activation, rounds_before_gate)
    for name, activation in GATE_ACTIVATIONS.items()
    for rounds_before_gate in (True, False)
)


def _npu_rms_norm(x: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    """The operator copies what is not contiguous, while its shape function, which the compiler believes, keeps the
    strides. Heads `[B, N, S, D]` are mostly `[B, S, N, D]` in memory: handing over that needs no copy."""
    if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return _npu_rms_norm(x.transpose(1, 2), gamma, eps).transpose(1, 2)
    if gamma is None:  # the operator has no form without gamma
        gamma = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    return torch.ops.npu.npu_rms_norm(x.contiguous(), gamma, epsilon=eps)[0]


class _OfOnePlusWeight(torch.autograd.Function):
    """`npu_gemma_rms_norm`, which adds the 1 in float32 and has no derivative in torch_npu: that of npu_rms_norm is
    one."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, rstd = torch.ops.npu.npu_gemma_rms_norm(x, weight, epsilon=eps)
        ctx.save_for_backward(x, weight, rstd)
        return changeable(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        gamma = ONE_PLUS_WEIGHT.value(weight)
        dx, d_gamma = torch.ops.npu.npu_rms_norm_backward(dy, x, gamma, rstd)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        return dx if needs_x else None, d_gamma.to(weight.dtype) if needs_weight else None, None


def _npu_of_one_plus_weight(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dim() == 4 and not x.is_contiguous() and x.transpose(1, 2).is_contiguous():
        return _npu_of_one_plus_weight(x.transpose(1, 2), weight, eps).transpose(1, 2)
    x, weight = x.contiguous(), weight.contiguous()  # the operator documents that it takes nothing else
    normalized: Tensor = _OfOnePlusWeight.apply(x, weight, eps)
    return normalized


def _npu_gated(y: Tensor, gate: Tensor) -> Tensor:
    """The two halves of what SwiGLU takes."""
    gated: Tensor = torch.ops.npu.npu_swiglu(torch.cat((gate, y), -1), dim=-1)
    return gated


_present: dict[str, bool] = {}


def _missing() -> str | None:
    """Asked wherever implementations are chosen. torch.compile cannot ask the dispatcher, so answers are kept."""
    lacking = needs_operators(NPU_RMS_NORM)()
    if lacking is None:
        _present.update({each.name: each.missing() is None for each in (GEMMA, NPU_SWIGLU)})
    return lacking


def _has(operator: Operator) -> bool:
    return _present[operator.name] if operator.name in _present else operator.missing() is None


def _by_npu(
    variant: RMSNormVariant,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    gate: Tensor | None = None,
    gate_in_float32: bool = False,
) -> Tensor:
    one_plus = variant.gamma is ONE_PLUS_WEIGHT and variant.gate is None
    if one_plus and weight is not None and x.dtype == weight.dtype == variant.output_dtype(x, weight) and _has(GEMMA):
        return _npu_of_one_plus_weight(x, weight, eps)
    in_one = _npu_gated if gate is not None and _has(NPU_SWIGLU) else None
    return normalize(_npu_rms_norm, variant, x, weight, eps, gate, gate_in_float32, in_one)


def _torch_rms_norm(x: Tensor, gamma: Tensor | None, eps: float) -> Tensor:
    if gamma is None or gamma.dtype == x.dtype:
        return F.rms_norm(x, x.shape[-1:], gamma, eps)
    return F.rms_norm(x.float(), x.shape[-1:], gamma, eps).to(x.dtype)


def _triton_rms_norm(
    variant: RMSNormVariant, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None, *_: Any
) -> Tensor:
    """In float32 up to the last rounding, whatever `gate_in_float32` says."""
    if gate is None:
        from npu_patch.kernels.rms_norm import rms_norm

        return rms_norm(x, weight, eps, variant.gamma)
    from npu_patch.kernels.gated_rms_norm import gated_rms_norm

    return gated_rms_norm(x, gate, weight, eps, KERNELS_ACTIVATIONS[variant.gate], variant.gamma)


def unsupported_by_triton(
    variant: RMSNormVariant, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None, *_: Any
) -> str | None:
    reason = _unsupported(variant, x, weight, eps, gate)
    if reason is not None:
        return reason
    if variant.gamma.kernel is None:
        return variant.gamma.why_no_kernel
    if variant.gate is not None and variant.gate not in KERNELS_ACTIVATIONS:
        return f"{variant.name}: there is no kernel for this gate"
    if not isinstance(eps, (int, float)) or eps <= 0:
        return f"eps {eps}: rows of zeros need a positive one"
    if variant.output_dtype(x, weight) != x.dtype:
        return f"{dtype_name(x.dtype)} that becomes {dtype_name(variant.output_dtype(x, weight))}"
    if x.dtype == torch.float32 and weight is not None and weight.dtype != torch.float32:
        return f"a weight of {dtype_name(weight.dtype)} beside float32"
    if any(tensor is not None and tensor.stride(-1) != 1 for tensor in (x, weight, gate)):
        return "a last dimension that is not contiguous"
    return too_wide(x, "rms_norm" if gate is None else "gated_rms_norm")


def too_wide(x: Tensor, kernels: str) -> str | None:
    """For the module `kernels`, whose kernels hold whole rows: an NPU's compiler refuses one that does not fit on
    chip."""
    if x.device.type != "npu":
        return None
    from npu_patch.kernels import launch

    return launch.why_too_wide(x.device, x.shape[-1], *import_module(f"npu_patch.kernels.{kernels}").TILES)


def _unsupported(
    variant: RMSNormVariant, x: Tensor, weight: Tensor | None, eps: float, gate: Tensor | None = None, *_: Any
) -> str | None:
    """Limits of npu_rms_norm (operator documentation): 2 to 8 dimensions, three float dtypes, gamma over the last."""
    if not is_plain(x) or not (weight is None or is_plain(weight)) or not (gate is None or is_plain(gate)):
        return "tensor subclass"
    if x.dtype not in FLOAT_DTYPES or not 2 <= x.dim() <= 8 or x.numel() == 0:
        return f"input of dtype {x.dtype}, {layout(x)}"
    if weight is not None and (weight.device != x.device or weight.shape != x.shape[-1:]):
        return f"weight of shape {tuple(weight.shape)} on {weight.device.type}"
    if weight is not None and weight.dtype not in FLOAT_DTYPES:
        return f"weight of dtype {weight.dtype}"
    if gate is not None and (gate.device != x.device or gate.shape != x.shape or not gate.is_floating_point()):
        return f"gate of dtype {gate.dtype}, {layout(gate)}, beside an input of {layout(x)}, or elsewhere"
    return None


def _key(variant: RMSNormVariant, x: Tensor, weight: Tensor | None, *_: Any) -> Hashable:
    return variant.name, x.shape[-1], x.dtype, None if weight is None else weight.dtype


_by_torch = partial(normalize, _torch_rms_norm)
RMS_NORM: Op[[RMSNormVariant, Tensor, Tensor | None, float, Tensor | None, bool], Tensor] = Op(
    "rms_norm",
    (
        Implementation(TRITON, ACCELERATORS, _triton_rms_norm, unsupported_by_triton, needs_triton, optional=True),
        Implementation(
            "torch_npu.npu_rms_norm",
            ("npu",),
            _by_npu,
            _unsupported,
            _missing,
            partly={"1 + weight in its kernel": GEMMA, "a gate in one more": NPU_SWIGLU},
        ),
        Implementation("torch.nn.functional.rms_norm", ("cuda", "cpu"), _by_torch, _unsupported),
    ),
    _key,
    RMSNormVariant.exact,
    (*PLAIN_VARIANTS, *GATED_VARIANTS),
)


def case(variant: RMSNormVariant, width: int, dtype: torch.dtype, weight_dtype: torch.dtype | None) -> Case:
    """`variant` of `[tokens, width]`, with a weight of `weight_dtype`, or None without one."""
    row = [] if weight_dtype is None else [((width,), weight_dtype)]
    rows = [dtype] if variant.gate is None else [dtype, dtype]

    def call(function: Callable[..., Any], x: Tensor, *others: Tensor) -> Any:
        weight = others[-1] if row else None
        return function(variant, x, weight, CASE_EPS, None if variant.gate is None else others[0], False)

    weighted = "" if weight_dtype is None else f", weight {dtype_name(weight_dtype)}"
    return Case(
        RMS_NORM,
        f"{variant.name}, {width} {dtype_name(dtype)}{weighted}",
        lambda tokens: [((tokens, width), each) for each in rows] + row,
        call,
    )
