"""One object says all of how a weight is used: its value, its kernel code and its derivative agree."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from npu_patch.kernels import head_tiles
from npu_patch.kernels import rms_norm as row_kernels
from npu_patch.kernels.gamma import GAMMAS, NONE, Gamma
from npu_patch.kernels.gated_rms_norm import gated_rms_norm
from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope
from npu_patch.kernels.rms_norm import add_rms_norm, rms_norm
from npu_patch.numerics.rotation import HALF
from npu_patch.ops.rope import TABLES, RoPEVariant
from tests.kernels.exactness import ONE_MACHINE, assert_exact, normal

EPS, WIDTH = 1e-6, 32
ROPE = RoPEVariant(HALF, TABLES[0])
EXP = Gamma("exp(weight)", lambda weight: weight.exp(), kernel=1, derivative=lambda weight: weight.float().exp())
WEIGHTED = [gamma for gamma in GAMMAS if gamma != NONE]


@triton.jit
def load_exp(weight, columns, mask, GAMMA: tl.constexpr):
    return tl.exp(tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32))


@pytest.fixture
def exp_in_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the formula in `load_gamma` would be of a kind whose derivative is not 1: there is none so far."""
    for module in (row_kernels, head_tiles):
        monkeypatch.setattr(module, "load_gamma", load_exp)


def normalized(x: Tensor, weight: Tensor) -> Tensor:
    """Of EXP."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return (y * weight.to(wide.dtype).exp()).to(x.dtype)


TABLE = normal(1, 5, WIDTH // 2, seed=7)  # narrower than a head: gamma comes in three parts
ROTARY = {"cos": TABLE, "sin": normal(1, 5, WIDTH // 2, seed=8)}


def rotated(x: Tensor, weight: Tensor) -> Tensor:
    tables = [table.to(x.dtype).unsqueeze(1) for table in ROTARY.values()]
    return ROPE.reference(normalized(x, weight).transpose(1, 2), *tables)


def fused_heads(q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
    return qk_norm_rope(q, k, *weights, **ROTARY, norm=QKNorm(EPS, EPS, EXP))


def heads_apart(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(q, q_weight), rotated(k, k_weight)


ROWS, HEADS, KEY_HEADS = (6, WIDTH), (1, 5, 4, WIDTH), (1, 5, 2, WIDTH)
KERNELS = {
    "rms_norm": (lambda x, w: rms_norm(x, w, EPS, EXP), normalized, [ROWS, (WIDTH,)]),
    "add_rms_norm": (
        lambda x, residual, w: add_rms_norm(x, residual, w, EPS, EXP),
        lambda x, residual, w: (normalized(x + residual, w), x + residual),
        [ROWS, ROWS, (WIDTH,)],
    ),
    "gated_rms_norm": (
        lambda x, gate, w: gated_rms_norm(x, gate, w, EPS, "silu", EXP),
        lambda x, gate, w: normalized(x, w) * torch.nn.functional.silu(gate),
        [ROWS, ROWS, (WIDTH,)],
    ),
    "qk_norm_rope": (fused_heads, heads_apart, [HEADS, KEY_HEADS, (WIDTH,), (WIDTH,)]),
}


@ONE_MACHINE
@pytest.mark.usefixtures("machine", "exp_in_kernels")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_derivative_other_than_1_is_in_the_weights_gradient(kernel: str) -> None:
    ours, original, shapes = KERNELS[kernel]
    assert_exact(ours, original, [normal(*shape, seed=3 + index) / 2 for index, shape in enumerate(shapes)])


@ONE_MACHINE
@pytest.mark.usefixtures("machine", "exp_in_kernels")
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_a_derivative_other_than_1_where_one_weight_is_trained(needed: tuple[bool, bool]) -> None:
    ours, original, shapes = KERNELS["qk_norm_rope"]
    inputs = [normal(*shape, seed=3 + index) / 2 for index, shape in enumerate(shapes)]
    assert_exact(ours, original, inputs, (False, False, *needed))


@ONE_MACHINE
@pytest.mark.usefixtures("machine", "exp_in_kernels")
def test_a_half_precision_weights_gradient_is_rounded_after_its_derivative() -> None:
    x, weight = normal(6, WIDTH), (normal(WIDTH, seed=3) / 2).bfloat16()
    leaf, exact = weight.clone().requires_grad_(), weight.double().requires_grad_()
    x = x.bfloat16()
    (got,) = torch.autograd.grad(rms_norm(x, leaf, EPS, EXP).float().sum(), leaf)
    (expected,) = torch.autograd.grad(normalized(x.double(), exact).sum(), exact)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected.bfloat16(), rtol=2**-8, atol=0)


@pytest.mark.parametrize("gamma", [*WEIGHTED, EXP], ids=lambda each: each.name)
def test_the_derivative_is_that_of_the_value(gamma: Gamma) -> None:
    weight = normal(WIDTH).double().requires_grad_()
    (expected,) = torch.autograd.grad(gamma.value(weight).sum(), weight)
    found = gamma.weight_gradient(torch.ones(WIDTH), weight.detach().float())
    torch.testing.assert_close(found, expected.float())


@ONE_MACHINE
@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("gamma", [each for each in WEIGHTED if each.kernel is not None], ids=lambda each: each.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_make_the_value(gamma: Gamma, dtype: torch.dtype) -> None:
    """Of rows of ones, whose norm is 1, up to its eps."""
    weight = normal(WIDTH).to(dtype)
    found = rms_norm(torch.ones(2, WIDTH, dtype=dtype), weight, 1e-12, gamma)
    torch.testing.assert_close(found, gamma.value(weight).to(dtype).expand(2, WIDTH))


def test_each_kernel_code_makes_one_value() -> None:
    codes = [gamma.kernel for gamma in GAMMAS]
    assert len(set(codes)) == len(codes)
