"""RMSNorm of each head of q and k, then their rotary embedding, as one operation.

Apart, the two read and write q and k twice, and the backward of each keeps what the other one wrote. torch_npu has no
operator that computes both: where no implementation here serves, its two operators run one after the other, which is
what the patches of RMSNorm and RoPE do anyway.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from npu_patch.ops.implementation import Implementation, is_plain
from npu_patch.ops.rms_norm import FLOAT_DTYPES, RMSNormVariant
from npu_patch.ops.rope import HALF, RoPEVariant


@dataclass(frozen=True)
class Heads:
    """q or k as the projection leaves it, x `[B, S, H, D]` of any strides, and how it is normalized over D."""

    x: Tensor
    weight: Tensor | None
    eps: float
    variant: RMSNormVariant

    @property
    def normalized_dtype(self) -> torch.dtype:
        return self.variant.output_dtype(self.x, self.weight)


Kernel = Callable[[Heads, Heads, Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def qk_norm_rope(
    kernel: Kernel, q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant
) -> tuple[Tensor, Tensor]:
    """q `[B, H, S, D]` and k `[B, K, S, D]`, normalized and rotated; cos and sin are `[B or 1, S, R]` as given to the
    original, and take no gradient."""
    dtype = q.normalized_dtype
    if rope.output == "promoted":
        dtype = torch.promote_types(dtype, cos.dtype)
    return kernel(q, k, rope.table.widen(cos), rope.table.widen(sin), dtype)


def why_not_fused(norms: tuple[RMSNormVariant, RMSNormVariant], rope: RoPEVariant) -> str | None:
    """Why no kernel here computes these norms before this rotation, or None."""
    if rope.pairing != HALF or rope.deinterleaved or rope.negated:
        return f"the rotation is {rope.name!r}, not that of halves"
    if norms[0].gamma != norms[1].gamma:
        return f"the norms of q and k differ: {norms[0].name!r} and {norms[1].name!r}"
    if any(norm.gate is not None for norm in norms):
        return "the norms are gated"
    return None


def _unsupported(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> str | None:
    reason = why_not_fused((q.variant, k.variant), rope)
    if reason is not None:
        return reason
    weights = [heads.weight for heads in (q, k) if heads.weight is not None]
    if not all(is_plain(tensor) for tensor in (q.x, k.x, cos, sin, *weights)):
        return "tensor subclass"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin needs a gradient"
    if any(x.dim() != 4 or x.dtype not in FLOAT_DTYPES or x.numel() == 0 for x in (q.x, k.x)):
        return f"q of shape {tuple(q.x.shape)} and dtype {q.x.dtype}"
    same = [
        (heads.x.dtype, heads.normalized_dtype, heads.x.device, *heads.x.shape[:2], heads.x.shape[3])
        for heads in (q, k)
    ]
    if same[0] != same[1]:
        return f"q of shape {tuple(q.x.shape)} beside k of shape {tuple(k.x.shape)}, or of another dtype"
    if any(w.device != q.x.device or w.shape != q.x.shape[-1:] or w.dtype not in FLOAT_DTYPES for w in weights):
        return "weights of another shape, dtype or device"
    if len({weight.dtype for weight in weights}) > 1:
        return "weights of two dtypes"
    if not (q.eps > 0 and k.eps > 0):
        return "an eps of 0"
    return _tables_unsupported(q.x, cos, sin, rope)


def _tables_unsupported(x: Tensor, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> str | None:
    width = 2 * cos.shape[-1] // rope.table.width(2)
    fits = cos.shape == sin.shape and cos.dim() == 3 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == x.shape[1]
    if not fits or width > x.shape[-1] or width % 2 or width == 0:
        return f"tables of shape {tuple(cos.shape)} for heads of shape {tuple(x.shape)}"
    if cos.device != x.device or cos.dtype not in FLOAT_DTYPES or sin.dtype != cos.dtype:
        return f"tables of dtype {cos.dtype} on {cos.device.type}"
    return None


def _triton(q: Heads, k: Heads, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    kernels = importlib.import_module("npu_patch.kernels.qk_norm_rope")
    norm = kernels.QKNorm(q.eps, k.eps, q.variant.gamma)
    return kernels.qk_norm_rope(q.x, k.x, q.weight, k.weight, cos, sin, norm, dtype)


def reference(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, Tensor]:
    """The original's arithmetic in plain torch, its roundings included."""
    return tuple(
        rope.reference(
            heads.variant.reference(heads.x, heads.weight, heads.eps).transpose(1, 2),
            cos.unsqueeze(1),
            sin.unsqueeze(1),
        )
        for heads in (q, k)
    )


def _triton_missing() -> str | None:
    try:
        readiness = importlib.import_module("npu_patch.kernels.readiness")
    except ImportError as error:
        return f"triton kernels cannot be imported: {error}"
    return readiness.why_not()


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("Triton kernel", ("npu", "cuda"), _triton, _unsupported, _triton_missing),
)
