"""The gated delta rule token by token, and the states that it leaves to go back to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from npu_patch import simulator
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.ops.gated_delta.op import GATED_DELTA_RULE
from npu_patch.ops.gated_delta.recorded import Recording, recorded, recording_of
from npu_patch.ops.gated_delta.rule import gated_delta_rule

OWN = GATED_DELTA_RULE.implementations[-1]
RECURRENT = GATED_DELTA_RULE.implementations[-2]


def call_of(tokens: int, dtype: torch.dtype, batch: int = 1) -> RuleCall:
    generator = torch.Generator().manual_seed(tokens)
    q, k = (torch.randn(batch, tokens, 2, 12, generator=generator).to(dtype) for _ in range(2))
    v = torch.randn(batch, tokens, 4, 20, generator=generator).to(dtype)
    g, beta = -torch.rand(batch, tokens, 4, generator=generator), torch.rand(batch, tokens, 4, generator=generator)
    state = torch.randn(batch, 4, 12, 20, generator=generator)
    return RuleCall(q, k, v, g, beta.to(dtype), state, output_final_state=True, normalize=True)


def on(call: RuleCall, device: Any) -> RuleCall:
    given = ("q", "k", "v", "g", "beta", "initial_state")
    return replace(call, **{name: getattr(call, name).to(device) for name in given})


def part(call: RuleCall, start: int, end: int, state: torch.Tensor) -> RuleCall:
    parts = (each[:, start:end] for each in (call.q, call.k, call.v, call.g, call.beta))
    return RuleCall(*parts, state, output_final_state=True, normalize=True)


@pytest.mark.parametrize("device", ["cpu", "npu"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_tokens_are_bitwise_as_many_single_ones(dtype: torch.dtype, batch: int, device: str) -> None:
    call = on(call_of(5, dtype, batch), device)
    assert call.initial_state is not None
    held = call.initial_state.clone()
    recording = Recording()
    recording.go_on(held, held)
    outputs, final = recorded(call, recording, OWN)
    recording.go_on(final, held.copy_(final))
    state: torch.Tensor | None = call.initial_state
    expected, states = [], []
    for at in range(5):
        assert state is not None
        output, state = gated_delta_rule(part(call, at, at + 1, state))
        expected.append(output)
        states.append(state)
    assert torch.equal(outputs, torch.cat(expected, 1)) and outputs.dtype == dtype
    assert all(torch.equal(one, other) for one, other in zip(recording.states[1:], states, strict=True))
    assert torch.equal(recording.states[0], call.initial_state)


@pytest.mark.parametrize("rejected", range(6))
def test_the_state_gone_back_to_is_that_of_the_accepted_tokens_alone(rejected: int) -> None:
    """Of two calls, the second of which is rejected in part or whole; and what follows is the same."""
    call = call_of(9, torch.float32)
    found = {}
    for fed in (6, 6 - rejected):
        assert call.initial_state is not None
        held, recording = call.initial_state.clone(), Recording()
        recording.go_on(held, held)
        for start, end in ((0, min(2, fed)), (min(2, fed), fed)):
            if end > start:
                _, final = recorded(part(call, start, end, held), recording, OWN)
                recording.go_on(final, held.copy_(final))
        held.copy_(recording.before(6 - fed if fed < 6 else rejected) if fed == 6 else held)
        found[fed] = held.clone(), gated_delta_rule(part(call, 6, 7, held))[0]
    assert all(torch.equal(one, other) for one, other in zip(found[6], found[6 - rejected], strict=True))


def test_a_state_that_was_not_kept_is_an_error_that_says_how_many_were() -> None:
    call, recording = call_of(3, torch.float32), Recording()
    held = torch.zeros(1, 4, 12, 20)
    recording.go_on(torch.ones(()), held)  # a prompt's
    _, final = recorded(part(call, 0, 3, held), recording, OWN)
    recording.go_on(final, held.copy_(final))
    with pytest.raises(RuntimeError, match=r"4 tokens cannot be taken back .* after the last 3 were kept"):
        recording.before(4)
    assert torch.equal(recording.before(3), torch.zeros_like(held))
    with pytest.raises(RuntimeError, match=r"1 tokens .* the last 0 were kept"):
        recording.before(1)


def test_a_call_whose_state_never_reached_the_cache_is_forgotten() -> None:
    """One that ended in an error, say: what is recorded next does not follow from it."""
    call, recording = call_of(3, torch.float32), Recording()
    held = torch.zeros(1, 4, 12, 20)
    recording.go_on(held, held)
    recorded(part(call, 0, 3, held), recording, OWN)
    _, final = recorded(part(call, 0, 1, held), recording, OWN)
    recording.go_on(final, held.copy_(final))
    assert len(recording.states) == 2 and torch.equal(recording.states[1], final)


def test_a_state_is_known_while_it_lives_and_as_itself_alone() -> None:
    held, recording = torch.zeros(1, 4, 12, 20), Recording()
    recording.go_on(held, held)
    assert recording_of(held) is recording
    assert recording_of(held.clone()) is None and recording_of(None) is None


@pytest.mark.parametrize("tokens", [1, 3, 8])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_recurrent_operator_writes_a_state_for_each_token(
    batch: int, tokens: int, npu: torch.device, simulated: None
) -> None:
    """In one call, whose kernels do not grow with them; and the first states are those of fewer tokens, bit by bit."""
    call = call_of(tokens, torch.bfloat16, batch)
    moved = on(call, npu)
    state = moved.initial_state
    assert state is not None
    before, recording = state.clone(), Recording()
    recorded(moved, recording, RECURRENT)
    with simulator.count() as counted:
        output, final = recorded(moved, recording, RECURRENT)
    assert counted.launches <= 8 and counted.host_copies == 0, counted
    assert len(recording.new) == tokens and recording.new[-1] is final and torch.equal(state, before)
    expected, one_by_one = Recording(), Recording()
    exact, _ = recorded(call, expected, OWN)
    fewer = part(moved, 0, max(tokens - 1, 1), state)
    recorded(fewer, one_by_one, RECURRENT)
    for found, other, same in zip(recording.new, expected.new, [*one_by_one.new, None], strict=False):
        assert (found.cpu().float() - other).norm() < 0.01 * other.norm()
        assert same is None or torch.equal(found, same)
    assert (output.cpu() - exact).float().norm() < 0.02 * exact.float().norm()


def test_more_tokens_than_the_operator_takes_are_single_ones(npu: torch.device, simulated: None) -> None:
    call = call_of(9, torch.bfloat16)
    recording = Recording()
    output, _ = recorded(on(call, npu), recording, RECURRENT)
    assert output.shape == call.v.shape and len(recording.new) == 9


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_a_further_token_takes_six_kernels(tokens: int, npu: torch.device, simulated: None) -> None:
    call, recording = on(call_of(tokens, torch.float32), npu), Recording()
    recorded(call, recording, OWN)
    with simulator.count() as counted:
        recorded(call, recording, OWN)
    most = {1: 11}.get(tokens, 14 + 6 * (tokens - 1))
    assert counted.launches <= most and counted.host_copies == 0, counted
