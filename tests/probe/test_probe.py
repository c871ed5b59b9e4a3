"""Probes: what they recognise, and the look-alikes that they refuse."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from npu_patch.ops.readings import NotRead
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS
from npu_patch.ops.rope import VARIANTS
from npu_patch.probe.rms_norm import read_rms_norm
from npu_patch.probe.rope import read_rope
from npu_patch.probe.swiglu import SwiGLUReading, computes_silu, read_swiglu

ROOT = Path(__file__).parents[2]


class Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def norm_like(formula: Callable[[Any, Tensor], Tensor]) -> type:
    return type("LooksLikeRMSNorm", (nn.Module,), {"forward": lambda self, x: formula(self, x)})


def scaled(x: Tensor, eps: float) -> Tensor:
    return x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)


LOOK_ALIKE_NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "LayerNorm": lambda self, x: self.weight * F.layer_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype),
    "eps outside the root": lambda self, x: (
        self.weight * (x.float() / (x.float().pow(2).mean(-1, keepdim=True).sqrt() + self.eps)).to(x.dtype)
    ),
    "sum for mean": lambda self, x: (
        self.weight * (x.float() * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + self.eps)).to(x.dtype)
    ),
    "another axis": lambda self, x: (
        self.weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-2, keepdim=True) + self.eps)).to(x.dtype)
    ),
    "computed in half precision": lambda self, x: (
        self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))
    ),
    "2 + weight": lambda self, x: (scaled(x, self.eps) * (2.0 + self.weight.float())).to(x.dtype),
    "weight squared": lambda self, x: (scaled(x, self.eps) * self.weight.float().square()).to(x.dtype),
    "eps ignored": lambda self, x: self.weight * scaled(x, 0.0).to(x.dtype) + 0.0 * self.eps,
    "weight without gradient": lambda self, x: self.weight.detach() * scaled(x, self.eps).to(x.dtype),
    "input without gradient": lambda self, x: self.weight * scaled(x.detach(), self.eps).to(x.dtype),
    "always float32": lambda self, x: self.weight.float() * scaled(x, self.eps),
    "clamped": lambda self, x: self.weight * scaled(x, self.eps).clamp(max=1.5).to(x.dtype),
}


@pytest.mark.parametrize("name", LOOK_ALIKE_NORMS)
def test_a_look_alike_norm_is_refused_with_a_reason(name: str) -> None:
    cls = norm_like(LOOK_ALIKE_NORMS[name])
    found = read_rms_norm(cls, cls.forward, gated=False)
    assert isinstance(found, NotRead) and found.reason


@pytest.mark.parametrize("variant", PLAIN_VARIANTS, ids=lambda variant: variant.name)
def test_each_variant_is_recognised_under_any_attribute_names(variant: Any) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return variant.reference(x, None if variant.gamma == "none" else self.apple, self.pear)

    cls = type("Anything", (nn.Module,), {"forward": forward})
    (reading,) = read_rms_norm(cls, forward, gated=False)
    assert reading.eps_name == "pear"
    assert reading.weight_name == (None if variant.gamma == "none" else "apple")
    assert (reading.variant.gamma, reading.variant.output) == (variant.gamma, variant.output)


@pytest.mark.parametrize("variant", GATED_VARIANTS, ids=lambda variant: variant.name)
def test_each_gated_variant_is_recognised(variant: Any) -> None:
    def forward(self: Any, x: Tensor, gate: Tensor) -> Tensor:
        return variant.reference(x, self.apple, self.pear, gate)

    cls = type("Anything", (nn.Module,), {"forward": forward})
    (reading,) = read_rms_norm(cls, forward, gated=True)
    assert reading.variant is variant


def test_a_gate_before_the_norm_is_refused() -> None:
    def forward(self: Any, x: Tensor, gate: Tensor) -> Tensor:
        return self.weight * scaled(x * F.silu(gate.float()), self.eps).to(x.dtype)

    cls = type("GateFirst", (nn.Module,), {"forward": forward})
    assert isinstance(read_rms_norm(cls, forward, gated=True), NotRead)


LIMITS = (3.0, 10.0, 50.0, 1000.0)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "limited",
    [
        lambda x, most, weight, eps: weight * scaled(x.clamp(-most, most), eps).to(x.dtype),
        lambda x, most, weight, eps: (
            weight * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True).clamp(max=most) + eps)).to(x.dtype)
        ),
    ],
    ids=["the input", "the variance"],
)
def test_a_norm_with_a_limit_is_none(limited: Any, limit: float) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return limited(x, limit, self.weight, self.eps)

    cls = type("Limited", (nn.Module,), {"forward": forward})
    assert isinstance(read_rms_norm(cls, forward, gated=False), NotRead)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "product",
    [
        lambda gate, up, most: (F.silu(gate) * up).clamp(-most, most),
        lambda gate, up, most: F.silu(gate.clamp(max=most)) * up,
        lambda gate, up, most: F.silu(gate) * up.clamp(-most, most),
    ],
    ids=["the product", "the gate", "up"],
)
def test_a_feed_forward_with_a_limit_is_none(product: Any, limit: float) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return self.down(product(self.gate(x), self.up(x), limit))

    assert isinstance(read_swiglu(type("Limited", (nn.Module,), {"forward": forward}), forward), NotRead)


def test_a_forward_that_keeps_something_on_its_layer_is_left_alone() -> None:
    def norm(self: Any, x: Tensor) -> Tensor:
        self.seen = x
        return self.weight * scaled(x, self.eps).to(x.dtype)

    def mlp(self: Any, x: Tensor) -> Tensor:
        self.kept = F.silu(self.gate(x)) * self.up(x)
        return self.down(self.kept)

    assert isinstance(read_rms_norm(type("Keeps", (nn.Module,), {"forward": norm}), norm, gated=False), NotRead)
    assert isinstance(read_swiglu(type("Keeps", (nn.Module,), {"forward": mlp}), mlp), NotRead)


def test_a_subclass_that_changes_the_arithmetic_is_read_anew(npu: torch.device) -> None:
    """Its class inherits the rebound forward; its own helper makes it something else."""
    import npu_patch

    class Parent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6))
            self.eps = 1e-3

        def gain(self) -> Tensor:
            return self.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.gain() * scaled(x, self.eps).to(x.dtype)

    class Child(Parent):
        def gain(self) -> Tensor:
            return self.weight * 3.0

    Parent.__module__ = Child.__module__ = __name__
    module = sys.modules[__name__]
    module.Parent, module.Child = Parent, Child
    try:
        pair = nn.ModuleList([Parent(), Child()]).to(npu)
        x = torch.randn(4, 6, device=npu)
        expected = [layer(x) for layer in pair]
        with npu_patch.applied(pair) as report:
            found = [layer(x) for layer in pair]
        (outcome,) = [outcome for outcome in report.patched if "Parent" in outcome.site]
        assert outcome.calls.ran == 1
        assert dict(outcome.calls.fell_through) == {"this instance computes no known RMSNorm": 1}
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    finally:
        del module.Parent, module.Child


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def rope_with(turn: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return (q * cos) + (turn(q) * sin), (k * cos) + (turn(k) * sin)

    return apply_rotary_pos_emb


def interleaved(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def test_the_same_body_with_another_rotate_half_is_another_variant() -> None:
    """As blt (interleaved) and nanochat (the other way round) have it."""
    names = [read_rope(rope_with(turn)).variant.name for turn in (rotate_half, interleaved, lambda x: -rotate_half(x))]
    assert names == ["half, promoted dtype", "interleave, promoted dtype", "half, negated, promoted dtype"]


LOOK_ALIKE_ROPES: dict[str, Callable[..., Any]] = {
    "quarters": rope_with(lambda x: x.roll(2, -1)),
    "key left alone": lambda q, k, cos, sin, unsqueeze_dim=1: (
        rope_with(rotate_half)(q, k, cos, sin, unsqueeze_dim)[0],
        k,
    ),
    "scaled": lambda q, k, cos, sin, unsqueeze_dim=1: tuple(
        1.5 * x for x in rope_with(rotate_half)(q, k, cos, sin, unsqueeze_dim)
    ),
    "sin twice": lambda q, k, cos, sin, unsqueeze_dim=1: rope_with(rotate_half)(q, k, sin, sin, unsqueeze_dim),
    "no gradient": lambda q, k, cos, sin, unsqueeze_dim=1: rope_with(rotate_half)(
        q.detach(), k.detach(), cos, sin, unsqueeze_dim
    ),
    "unsqueeze_dim ignored": lambda q, k, cos, sin, unsqueeze_dim=1: rope_with(rotate_half)(q, k, cos, sin, 1),
    "positions that matter": lambda q, k, cos, sin, position_ids=None, unsqueeze_dim=1: rope_with(rotate_half)(
        q,
        k,
        *((cos, sin) if position_ids is None else (cos[:, position_ids[0]], sin[:, position_ids[0]])),
        unsqueeze_dim,
    ),
    "an unknown parameter": lambda q, k, cos, sin, scale=1.0: (q * scale, k * scale),
    "complex numbers": lambda q, k, freqs_cis: (q, k),
}


@pytest.mark.parametrize("name", LOOK_ALIKE_ROPES)
def test_a_look_alike_rope_is_refused_with_a_reason(name: str) -> None:
    found = read_rope(LOOK_ALIKE_ROPES[name])
    assert isinstance(found, NotRead) and found.reason


def test_rope_variants_are_told_apart() -> None:
    """No variant's own formula is read as another variant."""
    for variant in VARIANTS:

        def apply(
            q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1, variant: Any = variant
        ) -> Any:
            cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            return variant.reference(q, cos, sin), variant.reference(k, cos, sin)

        apply.__signature__ = __import__("inspect").signature(rope_with(rotate_half))
        assert read_rope(apply).variant.name == variant.name


def test_the_older_signature_with_positions_that_do_not_matter_is_read() -> None:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Any = None, unsqueeze_dim: int = 1
    ) -> Any:
        return rope_with(rotate_half)(q, k, cos, sin, unsqueeze_dim)

    assert read_rope(apply_rotary_pos_emb).variant.name == "half, promoted dtype"


class MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.act(self.a(x)) * self.b(x))


LOOK_ALIKE_MLPS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a sum": lambda self, x: self.c(self.act(self.a(x)) + self.b(x)),
    "dropout between": lambda self, x: self.c(F.dropout(self.act(self.a(x)) * self.b(x), 0.5, self.training)),
    "a scale": lambda self, x: self.c(self.act(self.a(x)) * self.b(x) * 0.5),
    "a clamp": lambda self, x: self.c(self.act(self.a(x)).clamp(max=0.1) * self.b(x)),
    "a norm between": lambda self, x: self.c(self.norm(self.act(self.a(x)) * self.b(x))),
    "a residual": lambda self, x: self.c(self.act(self.a(x)) * self.b(x)) + x,
    "product in float32": lambda self, x: self.c(self.act(self.a(x)).float() * self.b(x).float()),
    "inline gelu": lambda self, x: self.c(F.gelu(self.a(x)) * self.b(x)),
    "no gate": lambda self, x: self.c(self.act(self.a(x))),
    "detached": lambda self, x: self.c(self.act(self.a(x)).detach() * self.b(x)),
    "reads a weight": lambda self, x: self.c(self.act(F.linear(x, self.a.weight)) * self.b(x)),
}


@pytest.mark.parametrize("name", LOOK_ALIKE_MLPS)
def test_a_look_alike_mlp_is_refused_with_a_reason(name: str) -> None:
    formula = LOOK_ALIKE_MLPS[name]
    cls = type("LooksLikeMLP", (nn.Module,), {"forward": lambda self, x: formula(self, x)})
    found = read_swiglu(cls, cls.forward)
    assert isinstance(found, NotRead) and found.reason


@pytest.mark.parametrize(
    ("formula", "reading"),
    [
        (lambda self, x: self.c(self.act(self.a(x)) * self.b(x)), SwiGLUReading("a", "b", "act", "c")),
        (lambda self, x: self.c(self.b(x) * self.act(self.a(x))), SwiGLUReading("a", "b", "act", "c")),
        (lambda self, x: self.c(F.silu(self.a(x)) * self.b(x)), SwiGLUReading("a", "b", None, "c")),
        (lambda self, x: fused(self, x, self.act), SwiGLUReading("a", None, "act", "c")),
        (lambda self, x: fused(self, x, F.silu), SwiGLUReading("a", None, None, "c")),
    ],
)
def test_the_parts_are_found_whatever_they_are_called(
    formula: Callable[[Any, Tensor], Tensor], reading: SwiGLUReading
) -> None:
    cls = type("Anything", (nn.Module,), {"forward": lambda self, x: formula(self, x)})
    assert read_swiglu(cls, cls.forward) == reading


def fused(self: Any, x: Tensor, activation: Callable[[Tensor], Tensor]) -> Tensor:
    gate, up = self.a(x).chunk(2, -1)
    return self.c(up * activation(gate))


def test_only_silu_is_silu() -> None:
    from transformers.activations import ACT2FN

    silu = {
        name for name in ("silu", "swish", "gelu", "gelu_new", "relu", "mish", "sigmoid") if computes_silu(ACT2FN[name])
    }
    assert silu == {"silu", "swish"}


def test_probes_draw_no_random_numbers() -> None:
    before = torch.get_rng_state()
    read_rms_norm(Norm, Norm.forward, gated=False)
    read_rope(rope_with(rotate_half))
    read_swiglu(MLP, MLP.forward)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture(scope="module")
def survey() -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-m", "npu_patch.simulator", "-m", "tests.support.probe_survey"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


def test_at_least_95_percent_of_all_rms_norm_classes_are_recognised(survey: dict[str, dict[str, Any]]) -> None:
    found = survey["rms_norm"]
    assert found["total"] >= 200
    assert found["recognised"] / found["total"] >= 0.95, found
    assert not found["unexplained"]


@pytest.mark.parametrize(("op", "at_least"), [("rope", 210), ("swiglu", 155)])
def test_most_rotary_functions_and_gated_mlps_are_recognised(
    op: str, at_least: int, survey: dict[str, dict[str, Any]]
) -> None:
    assert survey[op]["recognised"] >= at_least
