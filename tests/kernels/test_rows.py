"""SwiGLU and the RMSNorms in the interpreter, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.kernels.gamma import NONE, ONE_PLUS_WEIGHT
from npu_patch.kernels.gated_rms_norm import gated_rms_norm
from npu_patch.kernels.rms_norm import add_rms_norm, rms_norm
from npu_patch.kernels.swiglu import swiglu
from tests.kernels.exactness import ONE_MACHINE, assert_exact, in_turn, normal

pytestmark = pytest.mark.usefixtures("machine")
SHAPES = [(1, 64), (7, 80), (2, 5, 128), (3, 100), (2, 3, 256), (9, 70)]
AWKWARD = pytest.mark.parametrize(("shape", "dtype"), in_turn(SHAPES), ids=str)
EPS = 1e-6


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def original_norm(x: Tensor, weight: Tensor) -> Tensor:
    n = x.to(wide(x))
    return weight * (n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def some(count: int) -> list[tuple[bool, ...]]:
    return [needed for needed in itertools.product((True, False), repeat=count) if any(needed)]


@AWKWARD
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_exact(swiglu, lambda a, b: F.silu(a) * b, [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2)])


@ONE_MACHINE
@pytest.mark.parametrize("needed", some(2))
def test_swiglu_gradients_asked_for(needed: tuple[bool, ...]) -> None:
    assert_exact(swiglu, lambda a, b: F.silu(a) * b, [normal(5, 33), normal(5, 33, seed=2)], needed)


def test_swiglu_of_halves() -> None:
    both = normal(2, 5, 2 * 33)
    assert_exact(lambda x: swiglu(*x.chunk(2, -1)), lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [both])


def test_swiglu_of_large_values() -> None:
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0])
    gate = x.clone().requires_grad_()
    y = swiglu(gate, torch.ones(5))
    (gradient,) = torch.autograd.grad(y.sum(), gate)
    torch.testing.assert_close(y.detach(), F.silu(x))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]))


@AWKWARD
def test_add_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert_exact(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        lambda x, residual, weight: (original_norm(x + residual, weight), x + residual),
        [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2), normal(shape[-1], dtype=dtype, seed=3)],
    )


@ONE_MACHINE
@pytest.mark.parametrize("needed", some(3))
def test_add_rms_norm_gradients_asked_for(needed: tuple[bool, ...]) -> None:
    assert_exact(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS),
        lambda x, residual, weight: (original_norm(x + residual, weight), x + residual),
        [normal(5, 33), normal(5, 33, seed=2), normal(33, seed=3)],
        needed,
    )


@pytest.mark.parametrize("used", [0, 1])
def test_add_rms_norm_of_which_one_result_is_used(used: int) -> None:
    assert_exact(
        lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS)[used] + 0 * weight,
        lambda x, residual, weight: (original_norm(x + residual, weight), x + residual)[used] + 0 * weight,
        [normal(5, 33), normal(5, 33, seed=2), normal(33, seed=3)],
    )


@AWKWARD
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=3)]
    assert_exact(lambda x, weight: rms_norm(x, weight, EPS), original_norm, inputs)


def test_rms_norm_of_one_plus_weight_and_of_none() -> None:
    x, weight = normal(5, 33), normal(33, seed=3) / 8
    ours, original = (lambda x, w: rms_norm(x, w, EPS, ONE_PLUS_WEIGHT)), (lambda x, w: original_norm(x, 1 + w))
    assert_exact(ours, original, [x, weight])
    assert_exact(lambda x: rms_norm(x, None, EPS, NONE), lambda x: original_norm(x, torch.ones(33)), [x])


@AWKWARD
@pytest.mark.parametrize("activation", ["silu", "sigmoid"])
def test_gated_rms_norm(shape: tuple[int, ...], activation: str, dtype: torch.dtype) -> None:
    act = {"silu": F.silu, "sigmoid": torch.sigmoid}[activation]
    assert_exact(
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS, activation),
        lambda x, gate, weight: (original_norm(x, weight) * act(gate.to(wide(gate)))).to(x.dtype),
        [normal(*shape, dtype=dtype), normal(*shape, dtype=dtype, seed=2), normal(shape[-1], dtype=dtype, seed=3)],
    )


@ONE_MACHINE
@pytest.mark.parametrize("needed", some(3))
def test_gated_rms_norm_gradients_asked_for(needed: tuple[bool, ...]) -> None:
    assert_exact(
        lambda x, gate, weight: gated_rms_norm(x, gate, weight, EPS),
        lambda x, gate, weight: original_norm(x, weight) * F.silu(gate),
        [normal(5, 33), normal(5, 33, seed=2), normal(33, seed=3)],
        needed,
    )


def test_gated_rms_norm_of_strided_rows() -> None:
    """x and gate as slices of one projection."""
    assert_exact(
        lambda both, weight: gated_rms_norm(both[..., :16], both[..., 16:], weight, EPS),
        lambda both, weight: original_norm(both[..., :16], weight) * F.silu(both[..., 16:]),
        [normal(2, 5, 32), normal(16)],
    )
