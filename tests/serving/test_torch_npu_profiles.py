"""Releases of torch_npu whose operators differ: the patches compute what the model did, and say what they did without.

The installed torch_npu presents each profile (tests/support/torch_npu_profiles.py). scripts/test_torch_npu.sh runs the
tests on the genuine wheels."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import Report
from npu_patch.ops import rms_norm, rope, swiglu
from npu_patch.ops.attention import decode as attention_decode
from npu_patch.ops.attention import fusion as attention
from npu_patch.ops.attention.op import ATTENTION
from npu_patch.ops.experts import grouped_matmul, token_permute
from npu_patch.patches import CATALOGUE
from npu_patch.serving.implementation import choose
from npu_patch.serving.operators import Operator
from tests.ops.attention.test_attention import attend
from tests.support.attention_cases import Case, errors, exact, leaves
from tests.support.gradients import loss_and_gradients
from tests.support.parity import why_unequal
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.torch_npu_profiles import (
    ALIKE,
    NEWEST,
    RELEASES,
    genuine_gradient,
    genuine_schema,
    installed,
    operators,
    presenting,
    why_not_presentable,
)

USED: dict[str, list[Operator]] = {
    "rms_norm": [rms_norm.NPU_RMS_NORM],
    "rope": [rope.NPU_ROTARY_MUL],
    "swiglu": [swiglu.NPU_SWIGLU],
    "attention": [attention.NPU_ATTENTION],
    "experts": [
        grouped_matmul.NPU_GROUPED_MATMUL,
        token_permute.NPU_PERMUTE,
        token_permute.NPU_UNPERMUTE,
        swiglu.NPU_SWIGLU,
    ],
}
"""What each patch cannot do without."""
PARTLY = {
    "with attention sinks": attention.WITH_SINK,
    "with a bias": attention.WITH_BIAS,
    "single queries": attention_decode.OPERATOR,
}
"""What the attention patch has for some calls."""
REQUIRED = [(patch, operator) for patch, each in USED.items() for operator in each]
EVERY = [*(operator for _, operator in REQUIRED), *PARTLY.values()]
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5", "gemma3")
# A family that the patch serves, and what its gradients are compared by.
FAMILY_OF = {"experts": "qwen3_moe"}
# What is declined in a release, though the newest has it.
SINKS = "torch_npu.npu_fusion_attention, with attention sinks"
DECLINED: dict[str, dict[str, str]] = {
    "2.7.1": {SINKS: "this torch_npu's npu_fusion_attention has no sink"},
    "2.9.0": {},
    "2.13.0": {},
}
# Of a gated delta net, which uses none of them.
LACKING = ("npu_chunk_gated_delta_rule", "npu_fused_causal_conv1d")
LACKING_OF: dict[str, dict[str, str]] = {
    "qwen3_5": {f"torch_npu.{name}": f"this torch_npu has no {name}" for name in LACKING}
}


def named(pairs: Iterable[tuple[str, Operator]]) -> list[Any]:
    return [pytest.param(patch, operator, id=f"{patch}-{operator.name}") for patch, operator in pairs]


@pytest.fixture(params=RELEASES)
def release(request: pytest.FixtureRequest) -> str:
    """One that the installed torch_npu can present."""
    if (reason := why_not_presentable(RELEASES[request.param])) is not None:
        pytest.skip(reason)
    return request.param


def declined(report: Report) -> dict[str, str]:
    """What the report says that this torch_npu lacks, by implementation."""
    found = {name: why for outcome in report for name, why in outcome.as_dict()["declined"].items()}
    return {name: why for name, why in found.items() if "this torch_npu" in why}


def check_training(model: torch.nn.Module, npu: torch.device) -> Report:
    batch = tiny_batch()
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model) as report:
        patched = loss_and_gradients(model, batch)
    assert not report.failed
    assert why_unequal(on_cpu, batch, original, patched) is None
    return report


def patches_that_ran(report: Report) -> set[str]:
    return {outcome.patch for outcome in report.patched if outcome.calls.ran}


# ---- the data ----


def test_the_profile_is_what_the_installed_torch_npu_has() -> None:
    version = metadata.version("torch_npu")
    version = ALIKE.get(version, version)
    if version not in RELEASES:
        pytest.skip(f"torch_npu {version} has no profile")
    for name in operators():
        assert str(genuine_schema(name)) == str(RELEASES[version].schema(name)), name
        assert genuine_schema(name) is None or genuine_gradient(name) == RELEASES[version].has_gradient(name), name


def test_every_operator_in_use_is_in_the_profiles() -> None:
    assert {operator.name for operator in EVERY} <= set(operators())


# ---- releases ----


@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_unpatched_models(family: str, release: str, npu: torch.device) -> None:
    with presenting(RELEASES[release]):
        report = check_training(tiny(family), npu)
    assert patches_that_ran(report) >= {"rms_norm", "rope", "attention"}
    lacking = LACKING_OF.get(family, {}) if release != NEWEST else {}
    assert declined(report) == DECLINED[release] | lacking


# Which experts a token goes to, and a state, follow roundings: those families in float32 only.
@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((family, torch.float32) for family in FAMILIES), ("qwen3", torch.float16), ("gemma3", torch.float16)],
    ids=str,
)
def test_decoding_is_the_unpatched_models(family: str, dtype: torch.dtype, release: str, npu: torch.device) -> None:
    model = tiny(family, attn_implementation="eager").to(npu, dtype)
    ids = tiny_batch(length=7)["input_ids"].to(npu)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **arguments)
    model.set_attn_implementation("sdpa")
    # The norms of half precision round otherwise, once.
    only_attention = {"rms_norm": False, "rope": False, "swiglu": False} if dtype == torch.float16 else {}
    with presenting(RELEASES[release]) as calls, npu_patch.applied(model, **only_attention) as report:
        found = model.generate(ids, **arguments)
    assert torch.equal(found, expected)
    assert not report.failed and "attention" in patches_that_ran(report)
    single_queries = [call for call in calls if call.operator == attention_decode.OPERATOR.name]
    assert bool(single_queries) == (dtype == torch.float16)


def test_decoding_without_the_inference_operator(npu: torch.device) -> None:
    model = tiny("qwen3", attn_implementation="eager").to(npu, torch.float16)
    ids = tiny_batch(length=7)["input_ids"].to(npu)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **arguments)
    model.set_attn_implementation("sdpa")
    with (
        presenting(installed().lacking(attention_decode.OPERATOR.name)) as calls,
        npu_patch.applied(model, rms_norm=False, rope=False, swiglu=False) as report,
    ):
        found = model.generate(ids, **arguments)
    assert torch.equal(found, expected)
    assert {call.operator for call in calls} == {"npu_fusion_attention"}
    assert f"this torch_npu has no {attention_decode.OPERATOR.name}" in declined(report).values()


def test_calls_leave_out_only_what_is_the_same_in_every_release(release: str, npu: torch.device) -> None:
    """An argument that is not given gets its default: where a release has another one, or it was not declared as
    needed where it is given, another torch_npu would compute something else, or raise."""
    with presenting(RELEASES[release]) as calls:
        for family in FAMILIES:
            model = tiny(family).to(npu)
            with npu_patch.applied(model):
                loss_and_gradients(model, tiny_batch())
        model = tiny("qwen3").to(npu, torch.float16)
        with npu_patch.applied(model):
            model.generate(tiny_batch()["input_ids"].to(npu), max_new_tokens=3, do_sample=False)
    assert {call.operator for call in calls} >= {
        operator.name for operator in EVERY if operator not in (attention.WITH_SINK, attention.WITH_BIAS)
    }
    for call in set(calls):
        needed = {name for operator in EVERY if operator.name == call.operator for name in operator.arguments}
        assert set(call.keywords) <= needed, call.operator
        defaults: dict[str, set[str]] = {}
        for profile in RELEASES.values():
            for argument in profile.schema(call.operator).arguments:
                if argument.name not in {*call.positional, *call.keywords}:
                    defaults.setdefault(argument.name, set()).add(repr(argument.default_value))
        assert {name: values for name, values in defaults.items() if len(values) > 1} == {}, call.operator


# ---- a torch_npu that lacks one thing ----


@pytest.mark.parametrize(("patch", "operator"), named(REQUIRED))
def test_without_an_operator_the_rest_is_patched(patch: str, operator: Operator, npu: torch.device) -> None:
    with presenting(installed().lacking(operator.name)):
        report = check_training(tiny(FAMILY_OF.get(patch, "qwen3")), npu)
    ran = patches_that_ran(report)
    assert patch not in ran and len(ran) >= 3
    (warning,) = [text for text in report.warnings if text.startswith(f"{patch}: ")]
    assert f"this torch_npu has no {operator.name}" in warning


@pytest.mark.parametrize(("patch", "operator"), named((p, o) for p, o in REQUIRED if o.gradient))
def test_without_a_derivative_no_gradient_is_lost(patch: str, operator: Operator, npu: torch.device) -> None:
    with presenting(installed().lacking(operator.name, gradient=True)):
        report = check_training(tiny(FAMILY_OF.get(patch, "qwen3")), npu)
    assert patch not in patches_that_ran(report)
    assert f"this torch_npu's {operator.name} has no derivative" in "\n".join(report.warnings)


@pytest.mark.parametrize(("patch", "operator"), named((p, o) for p, o in REQUIRED if not o.gradient))
def test_derivatives_of_our_own_need_none_of_torch_npus(patch: str, operator: Operator, npu: torch.device) -> None:
    with presenting(installed().lacking(operator.name, gradient=True)):
        report = check_training(tiny(FAMILY_OF.get(patch, "qwen3")), npu)
    assert patch in patches_that_ran(report) and not declined(report)


@pytest.mark.parametrize(
    ("patch", "operator", "argument"),
    [
        pytest.param(patch, operator, argument, id=f"{patch}-{operator.name}-{argument}")
        for patch, operator in REQUIRED
        for argument in operator.arguments
    ],
)
def test_without_an_argument_the_implementation_is_declined(
    patch: str, operator: Operator, argument: str, npu: torch.device
) -> None:
    (implementations,) = [each.op.implementations for each in CATALOGUE if each.name == patch]
    with presenting(installed().lacking(operator.name, argument=argument)):
        choice = choose(implementations, "npu")
    assert choice.chosen is None
    assert f"this torch_npu's {operator.name} has no {argument}" in choice.why_none()
    assert choose(implementations, "npu").chosen is not None


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        (kind, argument)
        for kind, operator in PARTLY.items()
        for argument in (None, *operator.arguments)
        if argument is not None or operator.name != attention.NPU_ATTENTION.name  # without that none is served
    ],
)
def test_what_serves_some_calls_is_named_where_it_is_lacking(
    kind: str, argument: str | None, npu: torch.device
) -> None:
    operator = PARTLY[kind]
    with presenting(installed().lacking(operator.name, argument=argument)):
        choice = choose(ATTENTION.implementations, "npu")
    name = f"torch_npu.npu_fusion_attention, {kind}"
    reason = choice.declined[name]
    assert reason.startswith("this torch_npu") and operator.name in reason and (argument or "") in reason
    assert name not in choose(ATTENTION.implementations, "npu").declined


BIAS = torch.randn(1, 6, 11, 11, generator=torch.Generator().manual_seed(3))
SOME_CALLS = {
    "with attention sinks": (
        {"operator": "npu_fusion_attention", "argument": "sink"},
        "attention sinks: this torch_npu's npu_fusion_attention has no sink",
    ),
    "with a bias": (
        {"operator": "npu_fusion_attention_v2"},
        "a bias: this torch_npu has no npu_fusion_attention_v2",
    ),
}


@pytest.mark.parametrize("padding", [None, (3, 0)])
@pytest.mark.parametrize("kind", SOME_CALLS)
def test_calls_that_it_does_not_serve_are_right(kind: str, padding: tuple[int, int] | None, npu: torch.device) -> None:
    lacking, reason = SOME_CALLS[kind]
    case = Case(padding=padding)
    given = [*case.tensors(), torch.linspace(-1.0, 2.0, 6) if "sinks" in kind else BIAS]
    inputs, expected_inputs = leaves(given, npu), leaves(given, "cpu", torch.float64)
    keywords = {"s_aux" if "sinks" in kind else "position_bias": inputs[3]}
    with (
        presenting(installed().lacking(**lacking)),
        npu_patch.applied(device="npu", rms_norm=False, rope=False, swiglu=False) as report,
    ):
        out = attend(case, case.mask("npu", npu), inputs[:3], "npu", **keywords)
    (outcome,) = [each for each in report if each.site == "AttentionInterface['npu']"]
    assert outcome.calls.ran == 0 and dict(outcome.calls.fell_through) == {reason: 1}
    seen = case.seen()
    expected = exact(*expected_inputs[:3], seen, **{"sinks" if "sinks" in kind else "bias": expected_inputs[3]})
    assert max(errors(out, inputs, expected, expected_inputs, seen.any(-1, keepdim=True))) < 2e-6
