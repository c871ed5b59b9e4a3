"""A variant is served by what was made for it, or by nothing: no table of variants has a default."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch.kernels.gamma import NONE, WEIGHT, Gamma, widened
from npu_patch.kernels.readiness import why_not
from npu_patch.numerics.rotation import HALF
from npu_patch.ops import add_rms_norm, qk_norm_rope, rms_norm
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS, RMSNormVariant
from npu_patch.ops.rope import TABLES, RoPEVariant
from npu_patch.patches import CATALOGUE
from npu_patch.probe import rms_norm as probe
from npu_patch.serving.case import Alternative, Case
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR, apart
from tests.support.tiny_models import tiny, tiny_batch

EXP = "exp(weight)"
TOLERANCE = {torch.float32: NEAR, torch.bfloat16: 8e-3}


def exp_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps) * weight.float().exp()).to(x.dtype)


def exp_forward(self: torch.nn.Module, hidden_states: Tensor) -> Tensor:
    x = hidden_states.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return (x * self.weight.float().exp()).to(hidden_states.dtype)


@pytest.fixture
def exponential(monkeypatch: pytest.MonkeyPatch) -> Iterator[RMSNormVariant]:
    """A new variant, as somebody would add it: what gamma is, and the original's arithmetic."""
    variant = RMSNormVariant(EXP, Gamma(EXP, lambda weight: widened(weight).exp()), "input", exp_reference)
    monkeypatch.setattr(probe, "PLAIN_VARIANTS", (*PLAIN_VARIANTS, variant))
    yield variant
    npu_patch.restore()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("implementation", rms_norm.RMS_NORM.implementations, ids=lambda each: each.name)
def test_a_new_gamma_is_computed_or_declined_by_every_implementation(
    implementation: object, dtype: torch.dtype, exponential: RMSNormVariant, npu: torch.device
) -> None:
    device = npu if "npu" in implementation.device_types else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).to(device, dtype) for shape in ((3, 64), (64,)))
    reason = implementation.unsupported(exponential, x, weight, 1e-6)
    if implementation.optional:
        assert reason == f"gamma is {EXP!r}, for which there is no kernel"
        return
    assert reason is None
    exact = exponential.exact(x.cpu().double(), weight.cpu().double(), 1e-6)
    assert relative_error(implementation.run(exponential, x, weight, 1e-6).cpu(), exact) < TOLERANCE[dtype]


@pytest.mark.parametrize("variant", [*PLAIN_VARIANTS, *GATED_VARIANTS], ids=lambda each: each.name)
def test_the_definition_is_the_reference_in_float64(variant: RMSNormVariant) -> None:
    inputs = [torch.randn(3, 8, dtype=torch.float64), None if variant.gamma == NONE else torch.randn(8).double()]
    gate = [] if variant.gate is None else [torch.randn(3, 8, dtype=torch.float64)]
    expected = variant.reference(*inputs, 1e-6, *gate)
    assert relative_error(variant.exact(*inputs, 1e-6, *gate), expected) < NEAR


def definitions(variant: RMSNormVariant) -> dict[str, Case]:
    """The self-checks of every op with a norm in it."""
    nothing = Alternative("nothing", lambda *call: None)
    rotation = RoPEVariant(HALF, TABLES[0])
    wide = (torch.float64, torch.float64)
    return {
        "rms_norm": rms_norm.case(variant, 8, *wide),
        "add_rms_norm": add_rms_norm.case(variant, 8, *wide, nothing),
        "qk_norm_rope": qk_norm_rope.case(variant, rotation, (1, 1), 8, 8, *wide, nothing),
    }


def results(case: Case, inputs: list[Tensor]) -> Tensor:
    """By the definition, side by side."""
    found = case.definition(*inputs)
    return torch.cat([each.flatten() for each in ((found,) if isinstance(found, Tensor) else found)])


@pytest.mark.parametrize("op", ["rms_norm", "add_rms_norm", "qk_norm_rope"])
def test_a_new_gamma_is_in_every_definition_that_kernels_are_checked_with(op: str, exponential: RMSNormVariant) -> None:
    case, plain = definitions(exponential)[op], definitions(PLAIN_VARIANTS[0])[op]
    inputs = [torch.randn(shape, dtype=torch.float64) for shape, _ in case.inputs(4)]
    weights = [index for index, each in enumerate(inputs) if each.dim() == 1]
    as_weights = [each.exp() if index in weights else each for index, each in enumerate(inputs)]
    found = results(case, inputs)
    assert weights and relative_error(found, results(plain, as_weights)) < 1e-12
    assert relative_error(found, results(plain, inputs)) > 0.1


@pytest.mark.parametrize("triton", [False, True])
def test_a_family_with_a_new_gamma_computes_what_it_did(
    triton: bool, exponential: RMSNormVariant, npu: torch.device, monkeypatch: pytest.MonkeyPatch, two_cores: None
) -> None:
    if triton and (reason := why_not()) is not None:
        pytest.skip(reason)
    model = tiny("qwen3")
    for index, module in enumerate(model.modules()):
        if type(module) is type(model.model.norm):
            module.weight.data = torch.randn(module.weight.shape, generator=torch.Generator().manual_seed(index)) / 3
    model = model.to(npu)
    monkeypatch.setattr(type(model.model.norm), "forward", exp_forward)
    expected = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model, triton=triton)
    found = loss_and_gradients(model, tiny_batch())
    assert apart(found, expected) == {}
    (norm,) = [o for o in report.patched if o.patch == "rms_norm" and o.layers]
    assert norm.variant == EXP and norm.calls.ran > 0 and not norm.calls.fell_through
    if triton:
        assert norm.calls.declined["triton"] == f"gamma is {EXP!r}, for which there is no kernel"
        assert set(norm.calls.ran_by) == {"torch_npu.npu_rms_norm"}
        reasons = {o.patch: f"{o.reason} {dict(o.calls.fell_through)}" for o in report if o.layers}
        assert "no kernel" in reasons["qk_norm_rope"] and "no kernel" in reasons["add_rms_norm"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: RMSNormVariant("odd", EXP, "input", exp_reference),
            "gamma is 'exp\\(weight\\)'; accepted is a Gamma, as of none, w",
        ),
        (lambda: RMSNormVariant("odd", WEIGHT, "double", exp_reference), "output is 'double'; accepted are input"),
        (lambda: RoPEVariant("thirds", TABLES[0]), "pairing is 'thirds'; accepted are half, interleave"),
        (lambda: RoPEVariant(HALF, TABLES[0], output="double"), "output is 'double'; accepted are input, promoted"),
    ],
)
def test_a_variant_that_nothing_computes_cannot_be_made(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_gates_without_a_kernel_are_declined_by_it() -> None:
    variant = RMSNormVariant("tanh gate", WEIGHT, "input", exp_reference, torch.tanh)
    x, weight = torch.randn(2, 8), torch.randn(8)
    assert rms_norm.unsupported_by_triton(variant, x, weight, 1e-6, x) == "tanh gate: there is no kernel for this gate"


def test_patches_that_choose_at_every_call_are_not_tunable() -> None:
    assert [patch.name for patch in CATALOGUE if not patch.tunable] == [
        "vision_attention",
        "vision_on_host",
        "w8a8_norm",
        "cross_entropy",
        "captured_decode",
        "static_cache",
        "generate_batch",
        "mtp",
        "w8a8_loading",
        "w8a8_experts",
        "w8a8_peft",
    ]
