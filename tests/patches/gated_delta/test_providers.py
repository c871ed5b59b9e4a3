"""Kernels of other packages for gated delta nets: taken where their contract holds and their numbers are right."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import npu_patch
from npu_patch.ops.gated_delta import fla, mindspeed
from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall
from npu_patch.ops.gated_delta.rule import gated_delta_rule
from npu_patch.probe import gated_delta_checks as gated_delta_providers
from npu_patch.probe.gated_delta_checks import why_wrong
from npu_patch.probe.gated_delta_reference import recurrence
from npu_patch.reporting.outcome import Outcome
from tests.support.gated_delta_stand_ins import FAULTY_RULES, install, install_fla, install_mindspeed
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import RATIO
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.torch_npu_profiles import installed, presenting

OTHERS_OFF = {"fused_ops": False, "moe_patch": False, "lora": False, "loss": False}
OWN = "torch, float32"
MINDSPEED, FLA = "MindSpeed chunk_gated_delta_rule", "fla chunk_gated_delta_rule"
applied = functools.partial(npu_patch.applied, **OTHERS_OFF)


@pytest.fixture(autouse=True)
def _no_verdicts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(gated_delta_providers, "VERDICTS", {})
    yield


@pytest.fixture
def model(npu: torch.device) -> torch.nn.Module:
    return tiny("qwen3_5").bfloat16().to(npu)


def the_rule(report: npu_patch.Report) -> Outcome:
    (outcome,) = [outcome for outcome in report.patched if "over chunks" in outcome.variant and outcome.layers]
    return outcome


@pytest.mark.parametrize("module", ["npu_chunk_gated_delta_rule", "chunk_gated_delta_rule"])
def test_mindspeed_trains(module: str, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loss_and_gradients(model, tiny_batch())
    rule = install_mindspeed(monkeypatch, module)
    with applied(model) as report:
        trained = loss_and_gradients(model, tiny_batch())
        outcome = the_rule(report)
        assert outcome.implementation == MINDSPEED
        assert outcome.calls.ran_by == {MINDSPEED: 1}
        assert rule.calls == 3  # two of the self-check
        assert "cannot be imported" in outcome.declined[FLA]
        assert "comes first" in outcome.declined[OWN]
        loss_and_gradients(model, tiny_batch())
        assert rule.calls == 4
    assert relative_error(trained["loss"], original["loss"]) < 2.0**-7


def test_mindspeed_is_not_asked_for_what_it_refuses(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, initial states and single tokens."""
    rule = install_mindspeed(monkeypatch, "npu_chunk_gated_delta_rule")
    model = tiny("qwen3_5").to(npu)
    with applied(model) as report:
        model.generate(tiny_batch()["input_ids"].to(npu), max_new_tokens=3, do_sample=False)
    assert rule.calls == 0
    outcome = the_rule(report)
    assert outcome.calls.ran_by == {OWN: 1} and not outcome.calls.fell_through
    assert "16-bit" in outcome.as_dict()["declined"][MINDSPEED]
    assert f"{OWN} (1), not {MINDSPEED}" in " ".join(str(report).split())


def test_older_mindspeed_is_named(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, {"mindspeed": {}})
    with applied(model) as report:
        assert "core_r0.16.0" in the_rule(report).declined[MINDSPEED]
        assert the_rule(report).implementation == OWN


def test_mindspeed_with_another_signature_is_named(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunk_gated_delta_rule(q: object, k: object, v: object, g: object, beta: object) -> None: ...

    name = "mindspeed.core.ssm.npu_chunk_gated_delta_rule"
    install(monkeypatch, {"mindspeed": {}, name: {"chunk_gated_delta_rule": chunk_gated_delta_rule}})
    with applied(model) as report:
        assert "cu_seqlens" in the_rule(report).declined[MINDSPEED]


def test_what_mindspeed_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its newest source imports fla_npu, which nothing brings."""
    install(monkeypatch, {"mindspeed": {}})

    def import_module(name: str) -> object:
        if name == "mindspeed.core.ssm.npu_chunk_gated_delta_rule":
            raise ModuleNotFoundError("No module named 'fla_npu'", name="fla_npu")
        return genuine(name)

    genuine = mindspeed.importlib.import_module
    monkeypatch.setattr(mindspeed, "importlib", mock.Mock(import_module=import_module))
    assert mindspeed.RULE.missing() == (
        "mindspeed.core.ssm.npu_chunk_gated_delta_rule cannot be imported: No module named 'fla_npu'"
    )


@pytest.mark.parametrize("package", ["mindspeed", "fla"])
def test_wrong_numbers_are_rejected_and_named(
    package: str, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with applied(model):
        expected = loss_and_gradients(model, tiny_batch())
    if package == "mindspeed":
        install_mindspeed(monkeypatch, "npu_chunk_gated_delta_rule", off=1.1)
    else:
        install_fla(monkeypatch, off=1.1)
    name = MINDSPEED if package == "mindspeed" else FLA
    with applied(model) as report:
        found = loss_and_gradients(model, tiny_batch())
    outcome = the_rule(report)
    assert outcome.implementation == name  # chosen before anything touched the device
    assert outcome.calls.ran_by == {OWN: 1}
    assert "self-check: output is 0.1" in outcome.as_dict()["declined"][name]
    assert f"not {name} (self-check: output is" in " ".join(str(report).split())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class Kind(NamedTuple):
    values_per_key: int
    from_state: bool
    to_state: bool

    @property
    def grouped(self) -> bool:
        return self.values_per_key > 1

    def call(self, device: torch.device) -> RuleCall:
        heads = 2 * self.values_per_key
        q, k = (torch.randn(1, 9, 2, 12, device=device).bfloat16() for _ in range(2))
        v, g = torch.randn(1, 9, heads, 20, device=device).bfloat16(), -torch.rand(1, 9, heads, device=device)
        state = torch.randn(1, heads, 12, 20, device=device) if self.from_state else None
        return RuleCall(q, k, v, g, g.exp().bfloat16(), state, self.to_state, normalize=True)


KINDS = [Kind(*kind) for kind in itertools.product((1, 3), (False, True), (False, True))]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_right_rule_passes_for_every_kind_of_call(
    kind: Kind, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, _ = install_fla(monkeypatch)
    assert fla.RULE.missing() is None
    assert why_wrong(fla.RULE, kind.call(npu)) is None
    assert rule.calls == 2  # one of them packed


@pytest.mark.parametrize(
    ("fault", "reason", "met_by"),
    [
        ("gradient", "gradient of v is", None),
        ("packed", "output of packed sequences is", None),
        ("chunks forget", "output is", None),
        ("grouped", "output is", "grouped"),
        ("initial state dropped", "output is", "from_state"),
        ("final state", "final state is 0.1", "to_state"),
        ("final state's gradient", "gradient of", "to_state"),
        ("final state detached", "final state passes on no gradient", "to_state"),
    ],
)
def test_one_fault_alone_is_found_for_the_calls_that_meet_it(
    fault: str, reason: str, met_by: str | None, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may go on using the kernel."""
    install_fla(monkeypatch, rule=FAULTY_RULES[fault])
    assert fla.RULE.missing() is None
    for kind in KINDS:
        wrong = why_wrong(fla.RULE, kind.call(npu))
        if met_by is None or getattr(kind, met_by):
            assert wrong is not None and wrong.startswith(f"self-check: {reason}"), (kind, wrong)
        else:
            assert wrong is None, (kind, wrong)


def test_a_rule_that_mixes_up_grouped_heads_serves_no_model_with_them(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    with applied(model):
        expected = loss_and_gradients(model, tiny_batch())
    install_fla(monkeypatch, rule=FAULTY_RULES["grouped"])
    with applied(model) as report:
        found = loss_and_gradients(model, tiny_batch())
        assert the_rule(report).calls.ran_by == {OWN: 1}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("biased", [False, True])
def test_a_convolution_that_drops_its_bias_is_found(
    biased: bool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fla(monkeypatch)
    right = sys.modules[fla.CONVOLUTIONS].causal_conv1d

    def dropped(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, **others: Any) -> Any:
        return right(x, weight, None, **others)

    install(monkeypatch, {fla.CONVOLUTIONS: {"causal_conv1d": dropped}})
    x, weight = torch.randn(1, 8, 13, device=npu), torch.randn(8, 4, device=npu)
    call = ConvolutionCall(x, weight, torch.randn(8, device=npu) if biased else None, "silu")
    wrong = why_wrong(fla.CONVOLUTION, call)
    assert (wrong is not None and "output is" in wrong) if biased else wrong is None


def test_a_provider_that_raises_is_rejected(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fla(monkeypatch)

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("UB overflow")

    install(monkeypatch, {"fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": broken}})
    with applied(model) as report:
        loss_and_gradients(model, tiny_batch())
    assert "self-check: RuntimeError: UB overflow" in the_rule(report).as_dict()["declined"][FLA]


def test_fla_computes_rule_and_convolution(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loss_and_gradients(model, tiny_batch())
    rule, convolution = install_fla(monkeypatch)
    with applied(model) as report:
        found = loss_and_gradients(model, tiny_batch())
    assert rule.calls == 3 and convolution.calls == 3
    assert the_rule(report).calls.ran_by == {FLA: 1}
    assert relative_error(found["loss"], original["loss"]) < 2.0**-7


def test_fla_is_given_packed_lengths_on_the_host(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    rule, convolution = install_fla(monkeypatch)
    bounds = torch.tensor((0, 4, 13), dtype=torch.int32, device="npu")
    q, k = (torch.randn(1, 13, 2, 12, device="npu").bfloat16() for _ in range(2))
    v = torch.randn(1, 13, 4, 20, device="npu").bfloat16()
    g, beta = -torch.rand(1, 13, 4, device="npu"), torch.rand(1, 13, 4, device="npu").bfloat16()
    x, weight = torch.randn(1, 8, 13, device="npu"), torch.randn(8, 4, device="npu")
    with applied(model) as report:
        arguments = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": bounds, "use_cache": True, "max_length_q": 9}
        packed, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(q, k, v, g=g, beta=beta, **arguments)
        assert the_rule(report).calls.ran_by == {FLA: 1}
        rule_calls, convolution_calls = rule.calls, convolution.calls
        arguments["cu_seqlens"] = None
        alone, _ = modeling_qwen3_5.torch_chunk_gated_delta_rule(
            q[:, 4:], k[:, 4:], v[:, 4:], g=g[:, 4:], beta=beta[:, 4:], **arguments
        )
        torch.testing.assert_close(packed[:, 4:], alone, rtol=0, atol=2e-2)
        y = modeling_qwen3_5.causal_conv1d_fn(x, weight, None, activation="silu", cu_seq_lens_q=bounds)
        y_alone = modeling_qwen3_5.causal_conv1d_fn(x[..., 4:], weight, None, activation="silu")
        torch.testing.assert_close(y[..., 4:], y_alone)
    assert (rule.calls, convolution.calls) == (rule_calls + 1, convolution_calls + 4)


@pytest.mark.parametrize(
    ("version", "on_npu", "reason"),
    [("0.5.2", True, "0.5.2 is not newer"), ("0.4.1", True, "not newer"), ("0.6.0", False, "found no NPU")],
)
def test_fla_without_a_usable_backend_is_named(
    version: str, on_npu: bool, reason: str, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fla(monkeypatch, version, on_npu)
    with applied(model) as report:
        assert reason in the_rule(report).declined[FLA]


@pytest.mark.parametrize("lacking", [True, False])
@pytest.mark.parametrize(
    ("variant", "operator", "documented"),
    [
        ("over chunks", "npu_chunk_gated_delta_rule", "documented for -1 <= g only"),
        ("causal convolution", "npu_fused_causal_conv1d", "width 3 only"),
    ],
)
def test_torch_npu_s_own_operators_are_declined_for_what_is_true_of_it(
    variant: str, operator: str, documented: str, lacking: bool, model: torch.nn.Module
) -> None:
    """That it has none, or what its documentation says."""
    profile = installed().lacking(operator) if lacking else installed()
    with presenting(profile), applied(model) as report:
        outcome = next(outcome for outcome in report.patched if variant in outcome.variant and outcome.layers)
        reason = outcome.declined[f"torch_npu.{operator}"]
    if lacking or operator in profile.absent:
        assert reason == f"this torch_npu has no {operator}"
    else:
        assert documented in reason


def test_gates_of_a_model_leave_the_range_that_torch_npu_documents(model: torch.nn.Module) -> None:
    """-1 <= g, with transformers' own initial weights: why npu_chunk_gated_delta_rule is declined, even without
    gradients."""
    from transformers.models.qwen3_5 import modeling_qwen3_5

    gates: list[torch.Tensor] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        gates.append(kwargs["g"])
        return original(*args, **kwargs)

    original = modeling_qwen3_5.torch_chunk_gated_delta_rule
    with mock.patch.object(modeling_qwen3_5, "torch_chunk_gated_delta_rule", recorded), torch.no_grad():
        model(**{name: tensor.to("npu") for name, tensor in tiny_batch().items()})
    assert gates and min(g.min().item() for g in gates) < -1.0


def test_states_in_bfloat16_are_further_from_float64_than_the_bar() -> None:
    """Why npu_recurrent_gated_delta_rule has to be asked for: 1.1 times the original's distance is what is allowed."""
    tokens, generator = 128, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, tokens, 4, 32, generator=generator).bfloat16() for _ in range(3))
    g = -torch.rand(1, tokens, 4, generator=generator) * 0.1
    beta = torch.rand(1, tokens, 4, generator=generator).bfloat16()
    exact, _ = recurrence(*(x.double() for x in (q, k, v, g, beta)), normalize=True)

    def error(dtype: torch.dtype) -> float:
        state = torch.zeros(1, 4, 32, 32)
        outputs = []
        for t in range(tokens):
            now = (x[:, t : t + 1] for x in (q, k, v, g, beta))
            o, state = gated_delta_rule(RuleCall(*now, state, output_final_state=True, normalize=True))
            state = state.to(dtype).float()
            outputs.append(o)
        return relative_error(torch.cat(outputs, 1).double(), exact)

    assert error(torch.bfloat16) > RATIO * error(torch.float32)
