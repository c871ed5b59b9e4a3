"""Attention over heads that are padded with zeros: results and gradients by definition, what is left alone, what is
taken."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch.measuring import measurer
from npu_patch.measuring.measured_on import MeasuredOn
from npu_patch.measuring.measurements import Measurements
from npu_patch.measuring.measurer import Measurer
from npu_patch.ops.attention import padding
from npu_patch.ops.attention.band import CAUSAL_TOP_LEFT, Band
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.cases import cases
from npu_patch.ops.attention.fusion import IMPLEMENTATION
from npu_patch.ops.attention.op import ATTENTION
from npu_patch.ops.attention.padding import PADDED, multiple_of_32, power_of_two
from npu_patch.serving.calls import Calls
from npu_patch.serving.case import Measured
from npu_patch.serving.dispatch import NO_LAYERS, Dispatch, Verdict
from npu_patch.serving.implementation import Choice
from npu_patch.sites.sites import LiveModules
from tests.support.attention_cases import BOUNDS
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.made_up_clock import made_up
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch

TO_POWERS, TO_32 = PADDED
ENDS = ((4, 9, 23), (4, 9, 23))
BATCH, TOKENS, HEADS, KEY_HEADS = 2, 23, 4, 2
FORMS = {
    "full": Attention(0.3),
    "causal": Attention(0.3, CAUSAL_TOP_LEFT),
    "window": Attention(0.3, Band(5, 0)),
    "packed": Attention(0.3, ends=ENDS),
    "packed, causal": Attention(0.3, Band(after=0), ends=ENDS),
    "mask": Attention(0.3, hidden=(torch.arange(TOKENS) % 3 == 1).expand(BATCH, 1, TOKENS, TOKENS)),
    "bias": Attention(0.3, bias=torch.linspace(-1, 1, TOKENS).bfloat16().float().expand(1, HEADS, TOKENS, TOKENS)),
    "sinks": Attention(0.3, CAUSAL_TOP_LEFT, sink=torch.linspace(-1, 1, HEADS)),
}


def heads(width: int, value_width: int, packed: bool, dtype: torch.dtype) -> list[Tensor]:
    """`[B, N, S, D]` of `[B, S, N, D]` in memory, as projections make them; packed `[T, N, D]`."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(HEADS, width), (KEY_HEADS, width), (KEY_HEADS, value_width)]
    lengths = (TOKENS,) if packed else (BATCH, TOKENS)
    found = [torch.randn(*lengths, *shape, generator=generator).to(dtype) for shape in shapes]
    return found if packed else [each.transpose(1, 2) for each in found]


def moved(attention: Attention, dtype: torch.dtype, device: Any) -> Attention:
    tensors = {name: getattr(attention, name) for name in ("hidden", "bias", "sink")}
    there = {
        name: each.to(device, dtype if each.is_floating_point() else None)
        for name, each in tensors.items()
        if each is not None
    }
    return replace(attention, **there)


def results(
    function: Callable[..., Tensor], given: list[Tensor], attention: Attention, device: Any, dtype: Any
) -> list[Tensor]:
    leaves = [each.to(device, dtype).requires_grad_() for each in given]
    out = function(*leaves, moved(attention, dtype, device))
    seeds = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    found = [out, *torch.autograd.grad(out, leaves, seeds.to(out))]
    return [each.detach().cpu().double() for each in found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("widths", [(72, 72), (80, 80), (40, 40), (80, 72), (192, 128)], ids=str)
@pytest.mark.parametrize("padded", PADDED, ids=["power of two", "multiple of 32"])
def test_padded_heads_are_attention_by_definition(
    padded: Any, widths: tuple[int, int], form: str, dtype: torch.dtype, npu: torch.device
) -> None:
    attention = FORMS[form]
    given = heads(*widths, attention.ends is not None, dtype)
    if padded.unsupported(*given, moved(attention, dtype, "cpu")) is not None:
        assert padded is TO_32 and widths in ((40, 40), (192, 128))
        return
    found = results(padded.run, given, attention, npu, dtype)
    exact = results(ATTENTION.exact, given, attention, "cpu", torch.float64)
    assert [each.shape for each in found] == [each.shape for each in exact]
    assert max(map(relative_error, found, exact)) < BOUNDS[dtype]


@pytest.mark.parametrize("form", ["full", "packed"])
def test_the_result_is_contiguous_and_no_wider(form: str, npu: torch.device) -> None:
    attention = FORMS[form]
    given = [each.to(npu) for each in heads(72, 72, attention.ends is not None, torch.bfloat16)]
    out = TO_POWERS.run(*given, attention)
    assert out.is_contiguous() and out.untyped_storage().nbytes() == out.nbytes
    assert out.shape == IMPLEMENTATION.run(*given, attention).shape


@pytest.mark.parametrize("form", ["full", "packed"])
def test_the_bits_are_the_same_with_gradients_and_without(form: str, npu: torch.device) -> None:
    attention = FORMS[form]
    given = [each.to(npu) for each in heads(80, 80, attention.ends is not None, torch.bfloat16)]
    watched = TO_POWERS.run(*(each.clone().requires_grad_() for each in given), attention)
    with torch.no_grad():
        assert torch.equal(TO_POWERS.run(*given, attention), watched)


def test_dropout_drops_what_it_drops_unpadded(npu: torch.device) -> None:
    given = [each.to(npu) for each in heads(72, 72, False, torch.float32)]
    outs = []
    for implementation in (IMPLEMENTATION, TO_POWERS, TO_32):
        torch.manual_seed(7)
        outs.append(implementation.run(*given, replace(FORMS["full"], dropout=0.4)).cpu())
    undropped = IMPLEMENTATION.run(*given, FORMS["full"]).cpu()
    assert max(relative_error(out, outs[0]) for out in outs) < 1e-6 < 0.1 < relative_error(undropped, outs[0])


@pytest.mark.parametrize(
    ("width", "to_powers", "to_32"),
    [(40, 64, 64), (64, 64, 64), (72, 128, 96), (80, 128, 96), (96, 128, 96), (112, 128, 128), (160, 256, 160)],
)
def test_how_wide_heads_become(width: int, to_powers: int, to_32: int) -> None:
    assert (power_of_two(width), multiple_of_32(width)) == (to_powers, to_32)


@pytest.mark.parametrize(
    ("padded", "width", "attention", "words"),
    [
        (TO_POWERS, 128, Attention(1.0), "heads of 128 need no zeros"),
        (TO_32, 96, Attention(1.0), "heads of 96 need no zeros"),
        (TO_32, 40, Attention(1.0), "the next power of two is as wide"),
        (TO_POWERS, 576, Attention(1.0), "heads of 576 would be 1024 wide, the operator takes 768"),
        (TO_POWERS, 80, Attention(1.0, decodes=True), "a single query: all keys of the cache would be copied"),
        (TO_POWERS, 70, Attention(1.0), "torch_npu keeps the operator to multiples of 4"),
    ],
)
def test_what_is_left_to_the_usual_one(padded: Any, width: int, attention: Attention, words: str) -> None:
    reason = padded.unsupported(*heads(width, width, False, torch.float32), attention)
    assert reason is not None and words in reason


def verdicts(
    padded_ms: dict[str, float], width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str | None]:
    """By form, what is taken, where the usual one takes 2 ms. The operator itself runs nowhere but on an NPU: here the
    definition stands for all."""
    monkeypatch.setattr("npu_patch.ops.attention.cases._TIMED_TOKENS", {"full": 24, "causal": 24, "packed": 24})
    ran: list[str] = []

    def noted(implementation: Any) -> Any:
        def run(*call: Any) -> Tensor:
            ran.append(implementation.name)
            return ATTENTION.exact(*call)

        return replace(implementation, run=run)

    times = {IMPLEMENTATION.name: 2.0, TO_POWERS.name: padded_ms["powers"], TO_32.name: padded_ms["32"]}
    kept = Measurements.read(tmp_path / "times.json", MeasuredOn("made up", {}))
    of_cpu = Measurer(torch.device("cpu"), kept, made_up(lambda form: form() or times[ran[-1]]))
    choice = Choice(noted(IMPLEMENTATION), {}, tuple(map(noted, PADDED)))
    found = {}
    for case in cases(2, 2, width, width, torch.float32, False):
        verdict = of_cpu.judge(case, choice)
        found[case.name.split(", 2 and 2 heads")[0]] = None if verdict.taken is None else verdict.taken.name
    return found


@pytest.mark.parametrize(
    ("powers", "of_32", "taken"),
    [(1.0, 1.5, TO_POWERS), (1.5, 1.0, TO_32), (2.0, 2.5, None), (3.0, 4.0, None)],
    ids=["powers of two", "multiples of 32", "as fast", "slower"],
)
def test_the_clock_says_which_width_is_taken_if_any(
    powers: float, of_32: float, taken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = verdicts({"powers": powers, "32": of_32}, 72, tmp_path, monkeypatch)
    timed = {"full", "causal", "packed"}
    assert {name for name, each in found.items() if each is not None} == (timed if taken is not None else set())
    assert {found[name] for name in timed} == {None if taken is None else taken.name}
    assert len(found) == 9


def test_nothing_is_timed_for_heads_that_no_zeros_are_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measurer, "times", lambda *given: pytest.fail("timed"))
    assert set(verdicts({"powers": 1.0, "32": 1.0}, 64, tmp_path, monkeypatch).values()) == {None}


def dispatch(**given: Any) -> Dispatch:
    return Dispatch(ATTENTION, Choice(IMPLEMENTATION, {}, PADDED), **given)


def test_what_was_found_faster_serves_calls_of_that_form_alone(npu: torch.device) -> None:
    calls = Calls()
    full = [each.to(npu) for each in heads(72, 72, False, torch.float32)]
    key = ATTENTION.key(*full, FORMS["full"])
    chosen = dispatch(faster={key: TO_32})
    assert chosen.serving(calls, *full, FORMS["full"]) is TO_32
    assert chosen.serving(calls, *full, FORMS["causal"]) is IMPLEMENTATION
    assert dict(calls.ran_by) == {TO_32.name: 1, IMPLEMENTATION.name: 1}


def test_where_nothing_was_found_faster_no_key_is_made(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    full = [each.to(npu) for each in heads(72, 72, False, torch.float32)]
    unmeasured, calls = dispatch(), Calls()
    unmeasured.op = replace(ATTENTION, key=lambda *call: pytest.fail("a key for nothing"))
    assert unmeasured.serving(calls, *full, FORMS["full"]) is IMPLEMENTATION
    assert dict(calls.ran_by) == {IMPLEMENTATION.name: 1}


@pytest.mark.parametrize(("width", "checked", "count"), [(80, False, 3), (64, False, 0), (80, True, 9), (64, True, 9)])
def test_without_checks_only_what_times_decide_is_waited_for(width: int, checked: bool, count: int) -> None:
    waiting = dispatch(cases=lambda live: cases(2, 2, width, width, torch.bfloat16, False))
    assert len(waiting.undecided(LiveModules(torch.nn.Identity()), checked)) == count


def test_the_report_says_that_no_heads_were_there_to_be_padded() -> None:
    (case, *_) = cases(2, 2, 64, 64, torch.float32, False)
    checked = Verdict(case, None, IMPLEMENTATION.name, {IMPLEMENTATION.name: Measured()})
    found = dispatch(verdicts={case.key(): checked}, asked=True)
    assert found.name() == IMPLEMENTATION.name
    assert found.declined() == {each.name: NO_LAYERS for each in PADDED}


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    npu_patch.restore()


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("implementation", ["sdpa", "npu"])
def test_a_model_whose_heads_are_padded_trains_as_unpatched(implementation: str, npu: torch.device) -> None:
    model, batch = (
        tiny("qwen3", head_dim=72, attn_implementation=implementation if implementation == "sdpa" else None),
        tiny_batch(),
    )
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    report = npu_patch.apply(model, head_padding=True)
    if implementation == "npu":
        model.set_attn_implementation("npu")
    assert apart(loss_and_gradients(model, batch), original) == {}
    (outcome,) = (each for each in report.patched if each.site == f"AttentionInterface['{implementation}']")
    assert set(outcome.calls.ran_by) == {TO_POWERS.name} and outcome.calls.ran == outcome.calls.ran_by[TO_POWERS.name]


@pytest.mark.usefixtures("restored")
def test_by_default_nothing_is_padded_on_the_simulated_device_and_the_report_says_why(
    simulated: None, npu: torch.device
) -> None:
    model = tiny("qwen3", head_dim=72).to(npu)
    report = npu_patch.apply(model)
    loss_and_gradients(model, tiny_batch())
    (outcome,) = (each for each in report.patched if each.site == "AttentionInterface['sdpa']")
    assert outcome.implementation == IMPLEMENTATION.name
    assert outcome.declined[TO_POWERS.name] == "times on the simulated device mean nothing"
    npu_patch.restore()
    outcome = next(e for e in npu_patch.apply(model, head_padding=False) if e.site == "AttentionInterface['sdpa']")
    assert outcome.declined[TO_POWERS.name] == "switched off by apply(head_padding=False)"


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(("padded_ms", "ran"), [(1.0, TO_32), (3.0, IMPLEMENTATION)], ids=["faster", "slower"])
def test_auto_pads_the_heads_of_a_model_where_the_clock_says_so(
    padded_ms: float, ran: Any, npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the simulated device as if it were a real one, by a clock that is made up."""
    padded: list[int] = []
    own = padding._padded
    monkeypatch.setattr(padding, "_padded", lambda heads, width: padded.append(width) or own(heads, width))
    monkeypatch.setattr("npu_patch.serving.implementation.is_simulated", lambda device_type: False)
    monkeypatch.setattr("npu_patch.ops.attention.cases._TIMED_TOKENS", {"full": 24, "causal": 24, "packed": 24})

    def stopwatch(function: Callable[[], Any]) -> float:
        padded.clear()
        function()
        return 1e-3 * (padded_ms + 0.5 * (128 in padded) if padded else 2.0)

    monkeypatch.setattr(measurer, "clock", lambda device: made_up(stopwatch))
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "times.json"))
    model, batch = tiny("qwen3", head_dim=72).to(npu), tiny_batch()
    original = loss_and_gradients(model, batch)
    report = npu_patch.apply(model, triton=False)
    assert apart(loss_and_gradients(model, batch), original) == {}
    (outcome,) = (each for each in report.patched if each.site == "AttentionInterface['sdpa']")
    assert set(outcome.calls.ran_by) == {ran.name}
    assert ("1 ms against 2 ms" in outcome.implementation) is (ran is TO_32)
    declined = TO_POWERS if ran is TO_32 else TO_32
    assert f"{padded_ms + 0.5 * (ran is TO_32):.3g} ms against 2 ms" in outcome.declined[declined.name]
