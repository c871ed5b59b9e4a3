"""QK RMSNorm with RoPE in the interpreter, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from npu_patch.kernels.gamma import NONE, ONE_PLUS_WEIGHT, ROUNDED_ONE_PLUS_WEIGHT, WEIGHT, Gamma
from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope
from npu_patch.numerics.rotation import HALF
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.ops.rope import TABLES, RoPEVariant
from tests.kernels.exactness import ONE_MACHINE, assert_exact, in_turn, normal

pytestmark = pytest.mark.usefixtures("machine")
ROPE = RoPEVariant(HALF, TABLES[0])
NORM = {variant.name: variant for variant in PLAIN_VARIANTS}["weight"]


def wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, gamma: Gamma) -> Tensor:
    """As transformers: `weight` rounds before gamma, the others after."""
    n = x.to(wide(x))
    n = n * torch.rsqrt(n.pow(2).mean(-1, keepdim=True) + eps)
    if gamma == WEIGHT:
        return weight * n.to(x.dtype)
    return (n if gamma == NONE else n * gamma.value(weight)).to(x.dtype)


def original(q, k, q_weight, k_weight, cos, sin, norm):
    """Norm, transpose and rotation as attention modules of transformers do them."""

    def one(x, weight, eps):
        y = rms_norm(x, weight, eps, norm.gamma).transpose(1, 2)
        return ROPE.reference(y, cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1))

    return one(q, q_weight, norm.q_eps), one(k, k_weight, norm.k_eps)


def tables(batch: int, length: int, rotary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Not from angles: the two halves differ, and nothing is assumed of them."""
    return normal(batch, length, rotary, dtype=dtype, seed=7), normal(batch, length, rotary, dtype=dtype, seed=8)


SIZES = [  # batch, length, heads of q, heads of k, head dimension, rotated
    (1, 1, 4, 2, 64, 64),
    (1, 5, 8, 2, 128, 128),
    (2, 5, 3, 1, 80, 80),
    (1, 3, 5, 3, 128, 96),
    (2, 3, 2, 2, 256, 64),
    (3, 1, 6, 6, 80, 20),
]


@pytest.mark.parametrize(("size", "dtype"), in_turn(SIZES), ids=str)
def test_against_float64(size: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, heads, kv_heads, dim, rotary = size
    cos, sin = tables(1, length, rotary, dtype)
    norm = QKNorm(1e-6, 1e-5)
    assert_exact(
        lambda *inputs: qk_norm_rope(*inputs, cos.to(inputs[0].dtype), sin.to(inputs[0].dtype), norm),
        lambda *inputs: original(*inputs, cos, sin, norm),
        [
            normal(batch, length, heads, dim, dtype=dtype),
            normal(batch, length, kv_heads, dim, dtype=dtype),
            normal(dim, dtype=dtype, seed=3),
            normal(dim, dtype=dtype, seed=4),
        ],
    )


@ONE_MACHINE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gamma", [ONE_PLUS_WEIGHT, ROUNDED_ONE_PLUS_WEIGHT, NONE], ids=lambda each: each.name)
def test_every_gamma(gamma: Gamma, dtype: torch.dtype) -> None:
    cos, sin = tables(2, 3, 16, dtype)
    norm = QKNorm(gamma=gamma)
    weights = [] if gamma == NONE else [normal(32, dtype=dtype, seed=3) / 8, normal(32, dtype=dtype, seed=4) / 8]

    def with_weights(function):
        return lambda q, k, *w: function(q, k, *(w or (None, None)), cos.to(q.dtype), sin.to(q.dtype), norm)

    inputs = [normal(2, 3, 3, 32, dtype=dtype), normal(2, 3, 1, 32, dtype=dtype), *weights]
    if gamma == ROUNDED_ONE_PLUS_WEIGHT:  # the rounding is part of it: float64 must round alike
        reference = with_weights(
            lambda q, k, a, b, cos, sin, _: original(
                q, k, rounded(a, dtype) - 1, rounded(b, dtype) - 1, cos, sin, QKNorm(gamma=ONE_PLUS_WEIGHT)
            )
        )
    else:
        reference = with_weights(original)
    assert_exact(with_weights(qk_norm_rope), reference, inputs)


def rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """1 + weight in `dtype`, with the gradient of the weight."""
    total = 1 + weight
    return total + ((1 + weight.to(dtype)).to(weight.dtype) - total).detach()


def test_float32_weights_beside_bfloat16() -> None:
    cos, sin = tables(1, 3, 32, torch.bfloat16)
    q, k = normal(1, 3, 2, 32, dtype=torch.bfloat16), normal(1, 3, 1, 32, dtype=torch.bfloat16)

    def reference(q, k, q_weight, k_weight):
        def one(x, weight):
            n = (weight * rms_norm(x, None, 1e-6, NONE).to(wide(x))).to(x.dtype)
            return ROPE.reference(n.transpose(1, 2), cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1))

        return one(q, q_weight), one(k, k_weight)

    weights = [normal(32), normal(32, seed=2)]
    assert_exact(lambda *given: qk_norm_rope(*given, cos, sin, QKNorm()), reference, [q, k, *weights])


@ONE_MACHINE
def test_weights_of_two_dtypes() -> None:
    cos, sin = tables(1, 3, 32, torch.float32)
    weights = [normal(32).bfloat16(), normal(32, seed=2)]
    q, k = normal(1, 3, 2, 32).requires_grad_(), normal(1, 3, 1, 32).requires_grad_()
    leaves = [weight.requires_grad_() for weight in weights]
    outputs = qk_norm_rope(q, k, *leaves, cos, sin, QKNorm())
    gradients = torch.autograd.grad([y.sum() for y in outputs], leaves)
    floats = [weight.detach().float().requires_grad_() for weight in weights]
    expected = torch.autograd.grad([y.sum() for y in qk_norm_rope(q, k, *floats, cos, sin, QKNorm())], floats)
    for gradient, weight, exact in zip(gradients, weights, expected, strict=True):
        assert gradient.dtype == weight.dtype
        torch.testing.assert_close(gradient, exact.to(weight.dtype), rtol=0, atol=0)


def test_float32_results_of_bfloat16() -> None:
    cos, sin = tables(1, 3, 32, torch.float32)
    q, k = normal(1, 3, 2, 32, dtype=torch.bfloat16), normal(1, 3, 1, 32, dtype=torch.bfloat16)
    weight = normal(32)
    got = qk_norm_rope(q, k, weight, weight, cos, sin, QKNorm(), torch.float32)
    exact = original(q.double(), k.double(), weight.double(), weight.double(), cos.double(), sin.double(), QKNorm())
    for a, b in zip(got, exact, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@ONE_MACHINE
@pytest.mark.parametrize("needed", [n for n in itertools.product((True, False), repeat=4) if any(n)])
def test_only_the_gradients_asked_for(needed: tuple[bool, ...]) -> None:
    cos, sin = tables(1, 3, 16, torch.float32)
    inputs = [normal(2, 3, 3, 16), normal(2, 3, 1, 16), normal(16, seed=3), normal(16, seed=4)]
    assert_exact(
        lambda *given: qk_norm_rope(*given, cos, sin, QKNorm()),
        lambda *given: original(*given, cos, sin, QKNorm()),
        inputs,
        needed,
    )


def test_saves_its_inputs_alone() -> None:
    cos, sin = tables(1, 3, 16, torch.float32)
    inputs = [x.requires_grad_() for x in (normal(1, 3, 3, 16), normal(1, 3, 1, 16), normal(16), normal(16, seed=2))]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.data_ptr()) or x, lambda x: x):
        qk_norm_rope(*inputs, cos, sin, QKNorm())
    assert set(saved) == {x.data_ptr() for x in (*inputs, cos, sin)}


def test_strided_inputs_and_gradients() -> None:
    """q beside its gate in each head, as qwen3_next projects them, and gradients in attention's own layout."""
    cos, sin = tables(2, 5, 8, torch.float32)
    q_gate, k = normal(2, 5, 3, 32), normal(2, 9, 2, 16)

    def strided(function):
        def run(q_gate, k, q_weight, k_weight):
            turned = cos.to(k.dtype), sin.to(k.dtype)
            q_out, k_out = function(q_gate[..., :16], k[:, 2:7], q_weight, k_weight, *turned, QKNorm())
            return q_out.contiguous() * 2, k_out.transpose(0, 3).contiguous() * 3

        return run

    assert_exact(strided(qk_norm_rope), strided(original), [q_gate, k, normal(16), normal(16, seed=2)])
