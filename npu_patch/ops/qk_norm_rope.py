"""RMSNorm of each head of q and k, then their rotary embedding, as one operation.

Apart, the two read and write q and k twice, and the backward of each keeps what the other one wrote. torch_npu has no
operator that computes both: where no implementation here serves, its two operators run one after the other, which is
what the patches of RMSNorm and RoPE do anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.numerics.rotation import HALF
from npu_patch.numerics.values import numbers
from npu_patch.ops.rms_norm import CASE_EPS, FLOAT_DTYPES, RMSNormVariant
from npu_patch.ops.rope import RoPEVariant, rotate
from npu_patch.serving.case import Alternative, Case
from npu_patch.serving.implementation import TRITON, Implementation, dtype_name, is_plain, layout, needs_triton


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
    return _tables_unsupported(q.x, cos, sin, rope) or _too_wide(q.x)


def _too_wide(x: Tensor) -> str | None:
    """The kernels hold whole heads: an NPU's compiler refuses one that does not fit on chip."""
    if x.device.type != "npu":
        return None
    from npu_patch.kernels import launch, qk_norm_rope

    return launch.why_too_wide(x.device, x.shape[-1], *qk_norm_rope.TILES)


def rotary_width(cos: Tensor, rope: RoPEVariant) -> int:
    """How many elements of a head a table rotates."""
    return 2 * cos.shape[-1] // rope.table.width(2)


def _tables_unsupported(x: Tensor, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> str | None:
    width = rotary_width(cos, rope)
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


# Called with q, k, cos, sin and the rotation, `run` returns q `[B, H, S, D]` and k `[B, K, S, D]`. cos and sin are
# `[B or 1, S, R]` as the original takes them.
IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation(TRITON, ACCELERATORS, _triton, _unsupported, needs_triton, optional=True),
)


def one_after_the_other(norm: Callable[..., Tensor], rotation: Callable[..., Tensor]) -> Callable[..., Any]:
    """A `run` of what serves where nothing here does: an implementation's of RMSNorm, then one's of RoPE."""

    def run(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> tuple[Tensor, Tensor]:
        normed = [norm(heads.variant, heads.x, heads.weight, heads.eps).transpose(1, 2) for heads in (q, k)]
        return tuple(rotate(rope, rotation, normed, cos.unsqueeze(1), sin.unsqueeze(1)))

    return run


@dataclass(frozen=True)
class Sizes:
    """What decides the time of a call, but for the number of tokens: tiles follow `rotary`, how much of a head is
    rotated."""

    heads: int
    key_heads: int
    head_dim: int
    rotary: int
    dtype: torch.dtype
    weight_dtype: torch.dtype | None

    @classmethod
    def of(cls, q: Heads, k: Heads, cos: Tensor, rope: RoPEVariant) -> Sizes:
        weight = None if q.weight is None else q.weight.dtype
        return cls(q.x.shape[2], k.x.shape[2], q.x.shape[3], rotary_width(cos, rope), q.x.dtype, weight)


def case(sizes: Sizes, norm: RMSNormVariant, rope: RoPEVariant, original: Alternative) -> Case:
    """One sequence. The results are put side by side: a `Case` has one."""
    width = sizes.head_dim
    tables: dict[Any, tuple[Tensor, Tensor]] = {}  # made before the clock runs

    def tables_for(x: Tensor) -> tuple[Tensor, Tensor]:
        key = x.shape[0], x.dtype, x.device
        if key not in tables:
            tables.clear()
            shape = (1, x.shape[0], rope.table.width(sizes.rotary))
            tables[key] = tuple(numbers(shape, seed, sizes.dtype).to(x.device, x.dtype) for seed in (7, 8))
        return tables[key]

    def call(run: Callable[..., Any], q: Tensor, k: Tensor, *weights: Tensor) -> Tensor:
        q_weight, k_weight = weights or (None, None)
        both = (
            Heads(x.unflatten(-1, (-1, width)).unsqueeze(0), weight, CASE_EPS, norm)
            for x, weight in ((q, q_weight), (k, k_weight))
        )
        return torch.cat(run(*both, *tables_for(q), rope), 1)

    def definition(*inputs: Tensor) -> Tensor:
        def run(q: Heads, k: Heads, cos: Tensor, sin: Tensor, rope: RoPEVariant) -> list[Tensor]:
            results = []
            for heads in (q, k):
                y = norm.exact(heads.x, heads.weight, heads.eps)
                results.append(rope.reference(y.transpose(1, 2), cos.unsqueeze(1), sin.unsqueeze(1)))
            return results

        return call(run, *inputs)

    def inputs(tokens: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        weights = [] if sizes.weight_dtype is None else [((width,), sizes.weight_dtype)] * 2
        return [((tokens, heads * width), sizes.dtype) for heads in (sizes.heads, sizes.key_heads)] + weights

    weighted = "" if sizes.weight_dtype is None else f", weight {dtype_name(sizes.weight_dtype)}"
    rotated = "" if sizes.rotary == width else f", {sizes.rotary} rotated"
    heads = f"{sizes.heads} and {sizes.key_heads} heads of {width}{rotated}"
    name = f"{norm.name}, {heads} {dtype_name(sizes.dtype)}{weighted}"
    return Case("qk_norm_rope", name, inputs, call, definition, original)
