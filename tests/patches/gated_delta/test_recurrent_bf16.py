"""Decoding by npu_recurrent_gated_delta_rule, which rounds states to bfloat16: only where it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from npu_patch import applied, simulator
from npu_patch.ops.gated_delta import recurrent
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.rule import gated_delta_rule
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.ops.gated_delta.test_step import moved, split
from tests.support.gradients import in_float64, relative_error
from tests.support.tiny_models import tiny

NAME = "torch_npu.npu_recurrent_gated_delta_rule"
FAMILIES = ("qwen3_next", "qwen3_5")
TOKENS = 64


def by_token(report: Report) -> Outcome:
    return next(each for each in report.patched if "by token" in each.variant and each.layers)


def made(family: str) -> torch.nn.Module:
    return tiny(family, max_position_embeddings=256).eval()


def forced(model: torch.nn.Module, ids: Tensor, cache: Any) -> Tensor:
    """Logits after each of `ids` `[B, T]`, the first eight a prompt, the others one by one."""
    with torch.no_grad():
        logits = [model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True).logits[:, -1]]
        for at in range(8, ids.shape[1]):
            logits.append(model(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits, 1).double().cpu()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_within_a_bound_of_float64(family: str, cache: str, npu: torch.device, simulated: None) -> None:
    """Over 64 tokens, at most half as far again from float64 as the model's own bfloat16, and the cache in float32."""
    model = made(family)
    ids = torch.randint(2, 100, (2, TOKENS), generator=torch.Generator().manual_seed(3))
    half = model.bfloat16()
    exact = forced(in_float64(half), ids, DynamicCache(config=model.config))
    half = half.to(npu)
    errors = {}
    for asked in (None, False, True):
        kept: Any = DynamicCache(config=half.config) if cache == "dynamic" else StaticCache(half.config, TOKENS + 2)
        with applied(half, patch=asked is not None, recurrent_bf16=bool(asked)) as report:
            errors[asked] = relative_error(forced(half, ids.to(npu), kept), exact)
            if asked is not None:
                ran = by_token(report).calls.ran_by
                assert (NAME in ran) is asked, ran
        states = [each.recurrent_states[0] for each in kept.layers if hasattr(each, "recurrent_states")]
        assert states and all(state.dtype == torch.float32 for state in states)
    assert errors[False] <= 1.1 * errors[None], errors
    assert errors[True] <= 1.5 * errors[None], errors


@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_takes_four_kernels_and_leaves_the_given_state_alone(
    batch: int, npu: torch.device, simulated: None
) -> None:
    q, k, v, g, beta, state = moved(split(batch, 2, 4, 16, 16, torch.bfloat16), npu)
    call = RuleCall(q, k, v, g, beta, state, output_final_state=True, normalize=True)
    assert recurrent.unsupported(call) is None
    before = state.clone()
    recurrent.run(call)
    with simulator.count() as counted:
        o, after = recurrent.run(call)
        state.copy_(after)  # as the cache does
    assert counted.launches == (4 if batch == 1 else 7) and counted.host_copies == 0, counted
    expected = gated_delta_rule(RuleCall(q, k, v, g, beta, before, output_final_state=True, normalize=True))
    assert relative_error(o.double().cpu(), expected[0].double().cpu()) < 2**-7
    assert relative_error(state.double().cpu(), expected[1].double().cpu()) < 2**-7
    state.copy_(before)
    recurrent.run(call)
    assert torch.equal(state, before)


@contextmanager
def changed(**changes: Any) -> Iterator[RuleCall]:
    q, k, v, g, beta, state = split(1, 2, 4, 16, 16, torch.bfloat16)
    given = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state, "normalize": True} | changes
    yield RuleCall(**given)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"initial_state": None}, "no state before it"),
        ({"q": torch.zeros(1, 2, 2, 16)}, "more than a token"),
        ({"q": torch.zeros(1, 1, 2, 16)}, "q of torch.float32"),
        ({"beta": torch.zeros(1, 1, 4)}, "beta of torch.float32"),
        ({"g": torch.zeros(1, 1, 4, dtype=torch.bfloat16)}, "g of torch.bfloat16"),
        ({"g": torch.zeros(1, 1, 4, requires_grad=True)}, "gradients"),
        ({"v": torch.zeros(1, 1, 4, 272, dtype=torch.bfloat16)}, "272 wide"),
        ({"v": torch.zeros(1, 1, 258, 16, dtype=torch.bfloat16)}, "258 heads"),
    ],
)
def test_what_the_operator_does_not_take_is_refused_by_its_reason(changes: dict[str, Any], reason: str) -> None:
    with changed(**changes) as call:
        assert reason in (recurrent.unsupported(call) or "")


def test_an_operator_that_computes_something_else_is_found_out_before_its_first_token(
    npu: torch.device, simulated: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = torch.ops.npu.npu_recurrent_gated_delta_rule
    monkeypatch.setattr(
        torch.ops.npu, "npu_recurrent_gated_delta_rule", lambda *args, **kwargs: genuine(*args, **kwargs) * 1.5
    )
    monkeypatch.setattr("npu_patch.probe.gated_delta_checks.VERDICTS", {})
    model = made("qwen3_5").bfloat16().to(npu)
    ids = torch.randint(2, 100, (1, 12)).to(npu)
    with applied(model, recurrent_bf16=True) as report:
        forced(model, ids, DynamicCache(config=model.config))
    outcome = by_token(report)
    assert NAME not in outcome.calls.ran_by
    assert any("self-check: output" in reason for reason in outcome.calls.declined.values()), outcome.calls.declined


def test_it_is_off_unless_asked_for_and_the_report_says_so(npu: torch.device) -> None:
    model = made("qwen3_5").to(npu)
    with applied(model) as report:
        assert by_token(report).declined[NAME] == "switched off by default"
