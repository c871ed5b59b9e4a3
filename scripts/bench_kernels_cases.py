"""What `bench_kernels.py` times: for each op its inputs, the bytes it must move, and the functions that compute it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.kernels.gated_rms_norm import gated_rms_norm
from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope
from npu_patch.kernels.rms_norm import add_rms_norm, rms_norm
from npu_patch.kernels.swiglu import swiglu

OURS, EAGER, TORCH, LIGER = "ours", "transformers, eager", "torch", "Liger-Kernel"
EPS = 1e-6


@dataclass(frozen=True)
class Made:
    inputs: list[Tensor]
    grads: list[Tensor]  # of the results


@dataclass(frozen=True)
class Case:
    """The first `differentiable` inputs get gradients. `labels` name results and gradients, in that order.

    `tiles` is the module that holds FORWARD and BACKWARD.
    """

    name: str
    description: str
    bytes_forward: int
    bytes_both: int
    differentiable: int
    labels: tuple[str, ...]
    make: Callable[[], Made]
    reference: Callable[..., Any]
    variants: dict[str, Callable[..., Any]]
    tiles: str | None
    has_partial_sums: bool = True
    eager: str = EAGER


def all_cases(tokens: int, dtype: torch.dtype, device: torch.device) -> list[Case]:
    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    return [
        _qk("qk norm + rope", tokens, 32, 4, 128, 128, normal),
        _qk("qk norm + rope, partial", tokens, 16, 2, 256, 64, normal),
        _qk("qk norm + rope, frozen", tokens, 32, 4, 128, 128, normal, frozen=True),
        _swiglu(tokens, 6144, normal),
        _rms_norm(tokens, 2048, normal),
        _add_rms_norm(tokens, 2048, normal),
        _gated_rms_norm(tokens, 32, 128, normal),
    ]


def _qk(
    name: str, tokens: int, heads: int, kv_heads: int, dim: int, rotary: int, normal: Callable[..., Tensor],
    frozen: bool = False,
) -> Case:  # fmt: skip
    def make() -> Made:
        angles = torch.arange(tokens)[:, None] * 1e4 ** -(torch.arange(0, rotary, 2) / rotary)[None, :]
        both = torch.cat((angles, angles), -1)[None]
        q, k = normal(1, tokens, heads * dim), normal(1, tokens, kv_heads * dim)
        tables = [table.to(device=q.device, dtype=q.dtype) for table in (both.cos(), both.sin())]
        weights = [1 + normal(dim, scale=0.1) for _ in range(2)]
        return Made([q, k, *weights, *tables], [normal(1, heads, tokens, dim), normal(1, kv_heads, tokens, dim)])

    def by_head(x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, dim)

    def ours(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return qk_norm_rope(by_head(q), by_head(k), q_weight, k_weight, cos, sin, QKNorm(EPS, EPS))

    def eager(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = _eager_norm(by_head(q), q_weight).transpose(1, 2), _eager_norm(by_head(k), k_weight).transpose(1, 2)
        return _eager_rope(q, cos, sin), _eager_rope(k, cos, sin)

    def liger(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q = rms(by_head(q), q_weight, EPS, 0.0, "llama").transpose(1, 2)
        k = rms(by_head(k), k_weight, EPS, 0.0, "llama").transpose(1, 2)
        return rope(q, k, cos, sin)

    variants = {OURS: ours, EAGER: eager}
    rms, rope = _liger("rms_norm", "LigerRMSNormFunction"), _liger("rope", "LigerRopeFunction")
    if rms and rope and rotary == dim:
        variants[LIGER] = liger
    bytes_one = tokens * (heads + kv_heads) * dim * 2
    return Case(
        name,
        f"{heads} and {kv_heads} heads of {dim}, {rotary} rotated" + (", weights need no gradient" if frozen else ""),
        2 * bytes_one,
        5 * bytes_one,
        2 if frozen else 4,
        ("q", "k", "dq", "dk") if frozen else ("q", "k", "dq", "dk", "dw_q", "dw_k"),
        make,
        eager,
        variants,
        "npu_patch.kernels.qk_norm_rope" if rotary == dim and not frozen else None,
    )


def _swiglu(tokens: int, width: int, normal: Callable[..., Tensor]) -> Case:
    variants: dict[str, Callable[..., Any]] = {OURS: swiglu, EAGER: lambda gate, up: F.silu(gate) * up}
    if liger := _liger("swiglu", "LigerSiLUMulFunction"):
        variants[LIGER] = liger
    size = tokens * width * 2
    return Case(
        "swiglu",
        f"two inputs of width {width}",
        3 * size,
        8 * size,
        2,
        ("y", "d_gate", "d_up"),
        lambda: Made([normal(1, tokens, width), normal(1, tokens, width)], [normal(1, tokens, width)]),
        lambda gate, up: F.silu(gate) * up,
        variants,
        "npu_patch.kernels.swiglu",
        has_partial_sums=False,
    )


def _rms_norm(tokens: int, width: int, normal: Callable[..., Tensor]) -> Case:
    variants = {
        OURS: lambda x, weight: rms_norm(x, weight, EPS),
        EAGER: _eager_norm,
        TORCH: lambda x, weight: F.rms_norm(x, (width,), weight, EPS),
    }
    if liger := _liger("rms_norm", "LigerRMSNormFunction"):
        variants[LIGER] = lambda x, weight: liger(x, weight, EPS, 0.0, "llama")
    size = tokens * width * 2
    return Case(
        "rms norm",
        f"width {width}",
        2 * size,
        5 * size,
        2,
        ("y", "dx", "dw"),
        lambda: Made([normal(1, tokens, width), 1 + normal(width, scale=0.1)], [normal(1, tokens, width)]),
        _eager_norm,
        variants,
        "npu_patch.kernels.rms_norm",
    )


def _add_rms_norm(tokens: int, width: int, normal: Callable[..., Tensor]) -> Case:
    def eager(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return _eager_norm(total, weight), total

    def with_torch(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return F.rms_norm(total, (width,), weight, EPS), total

    variants = {OURS: lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS), EAGER: eager}
    variants[TORCH] = with_torch
    if liger := _liger("fused_add_rms_norm", "LigerFusedAddRMSNormFunction"):
        variants[LIGER] = lambda x, residual, weight: liger(x, residual, weight, EPS, 0.0, "llama", False)
    size = tokens * width * 2
    return Case(
        "add + rms norm",
        f"width {width}",
        4 * size,
        8 * size,
        3,
        ("y", "sum", "dx", "d_residual", "dw"),
        lambda: Made(
            [normal(1, tokens, width), normal(1, tokens, width), 1 + normal(width, scale=0.1)],
            [normal(1, tokens, width), normal(1, tokens, width)],
        ),
        eager,
        variants,
        "npu_patch.kernels.rms_norm",
    )


def _gated_rms_norm(tokens: int, heads: int, dim: int, normal: Callable[..., Tensor]) -> Case:
    def eager(x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        return (_eager_norm(x, weight) * F.silu(gate.to(_wide(gate)))).to(x.dtype)

    size = tokens * heads * dim * 2
    return Case(
        "gated rms norm",
        f"{heads} heads of {dim}, silu",
        3 * size,
        8 * size,
        3,
        ("y", "dx", "d_gate", "dw"),
        lambda: Made(
            [normal(tokens * heads, dim), normal(tokens * heads, dim), 1 + normal(dim, scale=0.1)],
            [normal(tokens * heads, dim)],
        ),
        eager,
        {OURS: lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS), EAGER: eager},
        "npu_patch.kernels.gated_rms_norm",
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _eager_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As `LlamaRMSNorm` of transformers."""
    wide = x.to(_wide(x))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `apply_rotary_pos_emb` of transformers, with partial rotation as glm4_moe and qwen3_next write it."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, -1)
    y = rotated * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((y, passed), -1) if passed.shape[-1] else y


def _liger(module: str, function: str) -> Callable[..., Any] | None:
    try:
        return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function).apply
    except (ImportError, AttributeError):
        return None
