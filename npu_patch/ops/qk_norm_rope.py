"""RMSNorm of each head of q and k, then their rotary embedding, as one operation.

Apart, the two read and write q and k twice, and the backward of each keeps what the other one wrote. torch_npu has no
operator that computes both: where no implementation here serves, its two operators run one after the other, which is
what the patches of RMSNorm and RoPE do anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.numerics.rotation import HALF
from npu_patch.numerics.values import numbers
from npu_patch.ops.rms_norm import CASE_EPS, RMSNormVariant, too_wide
from npu_patch.ops.rope import RoPEVariant, rotary_dim
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import (
    FLOAT_DTYPES,
    TRITON,
    Implementation,
    dtype_name,
    is_plain,
    layout,
    needs_triton,
)
from npu_patch.serving.op import Op


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


def why_not_fused(norms: tuple[RMSNormVariant, RMSNormVariant], rope: RoPEVariant) -> str | None:
    """Why no kernel here computes these norms before this rotation, or None."""
    if rope.pairing != HALF or rope.deinterleaved or rope.negated:
        return f"the rotation is {rope.name!r}, not that of halves"
    if norms[0].gamma != norms[1].gamma:
        return f"the norms of q and k differ: {norms[0].name!r} and {norms[1].name!r}"
    if norms[0].gamma.kernel is None:
        return norms[0].gamma.why_no_kernel
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
    if any(x.dim() != 4 or x.dtype not in FLOAT_DTYPES or x.numel() == 0 for x in (q.x, k.x)):
        return f"q of dtype {q.x.dtype}, {layout(q.x)}"
    same = [
        (heads.x.dtype, heads.normalized_dtype, heads.x.device, *heads.x.shape[:2], heads.x.shape[3])
        for heads in (q, k)
    ]
    if same[0] != same[1]:
        return f"q of {layout(q.x)} beside k of {layout(k.x)}, or of another batch, length or dtype"
    if any(w.device != q.x.device or w.shape != q.x.shape[-1:] or w.dtype not in FLOAT_DTYPES for w in weights):
        return "weights of another shape, dtype or device"
    if len({weight.dtype for weight in weights}) > 1:
        return "weights of two dtypes"
    if not (q.eps > 0 and k.eps > 0):
        return "an eps of 0"
    return _tables_unsupported(q.x, cos, sin, rope) or too_wide(q.x, "qk_norm_rope")


def _tables_unsupported(x: Tensor, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> str | None:
    width = rotary_dim(cos, rope)
    fits = cos.shape == sin.shape and cos.dim() == 3 and cos.shape[0] in (1, x.shape[0]) and cos.shape[1] == x.shape[1]
    if not fits or width > x.shape[-1] or width % 2 or width == 0:
        return f"tables of another shape: {layout(cos)}, for heads of {layout(x)}"
    if cos.device != x.device or cos.dtype not in FLOAT_DTYPES or sin.dtype != cos.dtype:
        return f"tables of dtype {cos.dtype} on {cos.device.type}"
    return None


def _triton(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, Tensor]:
    from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope

    dtype = q.normalized_dtype
    if rope.output == "promoted":
        dtype = torch.promote_types(dtype, cos.dtype)
    norm = QKNorm(q.eps, k.eps, q.variant.gamma)
    cos, sin = rope.table.widen(cos), rope.table.widen(sin)
    return qk_norm_rope(q.x, k.x, q.weight, k.weight, cos, sin, norm, dtype)


def reference(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, Tensor]:
    """The original's arithmetic in plain torch, its roundings included."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    normed = [heads.variant.reference(heads.x, heads.weight, heads.eps).transpose(1, 2) for heads in (q, k)]
    return rope.reference(normed[0], cos, sin), rope.reference(normed[1], cos, sin)


def _exact(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, Tensor]:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    normed = [heads.variant.exact(heads.x, heads.weight, heads.eps).transpose(1, 2) for heads in (q, k)]
    return rope.reference(normed[0], cos, sin), rope.reference(normed[1], cos, sin)


def _key(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> Hashable:
    """What decides the time of a call, but for the number of tokens: tiles follow how much of a head is rotated."""
    weight_dtype = None if q.weight is None else q.weight.dtype
    return q.x.shape[2], k.x.shape[2], q.x.shape[3], rotary_dim(cos, rope), q.x.dtype, weight_dtype


# A call is q, k, cos, sin and the rotation, for q `[B, H, S, D]` and k `[B, K, S, D]`. cos and sin are `[B or 1, S, R]`
# as the original takes them.
QK_NORM_ROPE = Op(
    "qk_norm_rope",
    (Implementation(TRITON, ACCELERATORS, _triton, _unsupported, needs_triton, optional=True),),
    _key,
    _exact,
)


def one_after_the_other(norm: Callable[..., Tensor], rotation: Callable[..., Sequence[Tensor]]) -> Callable[..., Any]:
    """A `run` of what serves where nothing here does: an implementation's of RMSNorm, then one's of RoPE."""

    def run(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, ...]:
        normed = [norm(heads.variant, heads.x, heads.weight, heads.eps).transpose(1, 2) for heads in (q, k)]
        return tuple(rotation(normed, cos.unsqueeze(1), sin.unsqueeze(1), rope))

    return run


def case(
    norm: RMSNormVariant,
    rope: RoPEVariant,
    heads: tuple[int, int],
    head_dim: int,
    rotary: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    original: Alternative,
) -> Case:
    """One sequence, with so many `heads` of q and of k."""
    tables: dict[Any, tuple[Tensor, Tensor]] = {}  # made before the clock runs

    def tables_for(x: Tensor) -> tuple[Tensor, Tensor]:
        key = x.shape[0], x.dtype, x.device
        if key not in tables:
            tables.clear()
            shape = (1, x.shape[0], rope.table.width(rotary))
            cos, sin = (numbers(shape, seed, dtype).to(x.device, x.dtype) for seed in (7, 8))
            tables[key] = cos, sin
        return tables[key]

    def call(function: Callable[..., Any], q: Tensor, k: Tensor, *weights: Tensor) -> Any:
        q_weight, k_weight = weights or (None, None)
        both = (
            Heads(x.unflatten(-1, (-1, head_dim)).unsqueeze(0), weight, CASE_EPS, norm)
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        return function(*both, *tables_for(q), rope)

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        weights = [] if weight_dtype is None else [((head_dim,), weight_dtype)] * 2
        return [*(((tokens, count * head_dim), dtype) for count in heads), *weights]

    weighted = "" if weight_dtype is None else f", weight {dtype_name(weight_dtype)}"
    rotated = "" if rotary == head_dim else f", {rotary} rotated"
    sizes = f"{heads[0]} and {heads[1]} heads of {head_dim}{rotated} {dtype_name(dtype)}"
    return Case(QK_NORM_ROPE, f"{norm.name}, {sizes}{weighted}", inputs, call, original)
