"""What `auto` takes: kernels and times are made up here, the decision is real."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import logging
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import log
from npu_patch.applying import api as lifecycle
from npu_patch.applying.state import patched_sites
from npu_patch.kernels.gamma import NONE
from npu_patch.kernels.readiness import why_not
from npu_patch.measuring import in_turns, measure, measurements, measurer, tuning
from npu_patch.measuring.measured_on import MeasuredOn
from npu_patch.measuring.measurements import Measurements
from npu_patch.measuring.measurer import Measurer
from npu_patch.ops import rms_norm, swiglu
from npu_patch.patches import rms_norm as rms_norm_patch
from npu_patch.serving import case as case_of_op
from npu_patch.serving import dispatch
from npu_patch.serving.case import Measured
from npu_patch.serving.implementation import Choice, Implementation, choose
from tests.support.gradients import loss_and_gradients
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch

CPU = torch.device("cpu")
HERE = MeasuredOn("made up", {"torch": "1", "triton": "2"})
USUAL = choose(rms_norm.RMS_NORM.implementations, "cpu").chosen
CASE = rms_norm.case(rms_norm.PLAIN_VARIANTS[0], 24, torch.float32, torch.float32)


@pytest.fixture(autouse=True)
def quick_and_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    log.forget()
    monkeypatch.setattr(measure, "ELEMENTS", 256)  # nothing here looks at a real clock


@dataclass
class Kernels:
    """A fake kernel beside the usual one, a clock that knows what either takes, and what was timed."""

    fake_ms: float = 1.0
    usual_ms: float = 2.0
    factor: float = 1.0
    ran: list[str] = field(default_factory=list)
    timed: list[str] = field(default_factory=list)

    def of(self, name: str, optional: bool) -> Implementation:
        def run(*args: Any, **kwargs: Any) -> torch.Tensor:
            self.ran.append(name)
            return USUAL.run(*args, **kwargs) * (self.factor if optional else 1.0)

        return Implementation(name, ("cpu",), run, USUAL.unsupported, optional=optional)

    @property
    def implementations(self) -> tuple[Implementation, ...]:
        return self.of("fake", True), self.of("usual", False)

    def clock(self, forms: Mapping[str, Callable[[], Any]]) -> dict[str, Measured]:
        for form in forms.values():
            form()
            self.timed.append(self.ran[-1])
        return {name: Measured(seconds=1e-3 * (self.fake_ms if name == "fake" else self.usual_ms)) for name in forms}

    def choice(self) -> Choice:
        return choose(self.implementations, "cpu", "auto")


def one_second(forms: Mapping[str, Callable[[], Any]]) -> dict[str, Measured]:
    return {name: Measured(seconds=1.0) for name in forms}


def judge(kernels: Kernels, path: Path, measured_on: MeasuredOn = HERE) -> dispatch.Verdict:
    of_cpu = Measurer(CPU, Measurements.read(path, measured_on), kernels.clock)
    verdict = of_cpu.judge(CASE, kernels.choice())
    of_cpu.kept.save_changes()
    return verdict


@pytest.mark.parametrize(
    ("kernels", "taken", "words"),
    [
        (Kernels(), "fake", "1 ms against 2 ms"),
        (Kernels(fake_ms=3.0), None, "3 ms against 2 ms"),
        (Kernels(fake_ms=2.0), None, "2 ms against 2 ms"),
        (Kernels(factor=1.01), None, "self-check: the output is 0.01 of its size off"),
        (Kernels(factor=float("nan")), None, "self-check: the output is inf of its size off"),
    ],
    ids=["faster", "slower", "as fast", "wrong but fast", "no number"],
)
def test_only_a_correct_and_faster_kernel_is_taken(
    kernels: Kernels, taken: str | None, words: str, tmp_path: Path
) -> None:
    verdict = judge(kernels, tmp_path / "times.json")
    assert (verdict.taken and verdict.taken.name) == taken
    assert verdict.words("fake") == words
    if "self-check" in words:
        assert "fake" not in kernels.timed


def test_a_kernel_with_a_wrong_gradient_alone_is_refused(tmp_path: Path) -> None:
    def run(*args: Any) -> torch.Tensor:
        y = USUAL.run(*args)
        return y.detach() + 1.1 * (y - y.detach())

    wrong = Implementation("fake", ("cpu",), run, USUAL.unsupported, optional=True)
    of_cpu = Measurer(CPU, Measurements.read(tmp_path / "times.json", HERE), one_second)
    verdict = of_cpu.judge(CASE, choose((wrong, USUAL), "cpu", "auto"))
    assert verdict.taken is None
    assert "the gradient of input 0 is 0.1" in verdict.words("fake")


def test_a_kernel_that_raises_is_refused_and_named(tmp_path: Path) -> None:
    def run(*args: Any) -> torch.Tensor:
        raise RuntimeError("ub overflow\nand more")

    broken = Implementation("fake", ("cpu",), run, USUAL.unsupported, optional=True)
    of_cpu = Measurer(CPU, Measurements.read(tmp_path / "times.json", HERE), one_second)
    verdict = of_cpu.judge(CASE, choose((broken, USUAL), "cpu", "auto"))
    assert (verdict.taken, verdict.words("fake")) == (None, "RuntimeError: ub overflow")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("case", "implementations"),
    [
        (lambda dtype: swiglu.case(72, dtype), swiglu.SWIGLU.implementations),
        *(
            (lambda dtype, v=variant: rms_norm.case(v, 48, dtype, None if v.gamma == NONE else dtype), None)
            for variant in (*rms_norm.PLAIN_VARIANTS, *rms_norm.GATED_VARIANTS)
        ),
    ],
)
def test_the_usual_implementations_pass_every_case(case: Any, implementations: Any, dtype: torch.dtype) -> None:
    usual = choose(implementations or rms_norm.RMS_NORM.implementations, "cpu").chosen
    alternative = case_of_op.Alternative(usual.name, usual.run)
    assert measure.check(case(dtype), alternative, CPU) == Measured()
    assert measure.times(case(dtype), [alternative], CPU, one_second) == {usual.name: Measured(seconds=1.0)}


def test_the_clock_times_several_calls_between_two_idle_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(in_turns, "synchronize", lambda device: events.append("idle"))
    found = measure.clock(CPU)({"one": lambda: events.append("one"), "other": lambda: events.append("other")})
    assert set(found) == {"one", "other"}
    in_a_row = "".join(event[0] for event in events).split("ii")
    assert len(in_a_row[-1]) > 10 and {each[0] for each in in_a_row[-4:]} == {"o"}
    low, high = found["one"].quartiles
    assert 0.0 < low <= found["one"].seconds <= high


def test_one_that_cannot_go_on_leaves_the_others_their_times() -> None:
    def clock(forms: Mapping[str, Callable[[], Any]]) -> dict[str, Measured]:
        if "broken" in forms:
            raise RuntimeError("vector core exception")
        return one_second(forms)

    alternatives = [case_of_op.Alternative(name, USUAL.run) for name in ("broken", "fine")]
    found = measure.times(CASE, alternatives, CPU, clock)
    assert found == {"broken": Measured("RuntimeError: vector core exception"), "fine": Measured(seconds=1.0)}


@pytest.mark.parametrize(
    ("quartiles", "winner"), [((0.8, 1.1), "usual"), ((0.8, 0.9), "fake"), ((0.7, 0.95), "usual"), (None, "usual")]
)
def test_auto_wants_what_tune_wants_times_that_are_clearly_apart(
    quartiles: tuple[float, float] | None, winner: str
) -> None:
    seconds = 0.85 if quartiles else 1.0
    times = {"fake": Measured(None, seconds, quartiles), "usual": Measured(None, 1.0, (0.95, 1.2))}
    assert measure.fastest(times, "usual") == winner
    words = dispatch.Verdict(CASE, None, "usual", times).words("fake")
    assert words.endswith(", not clearly faster") == (quartiles is not None and winner == "usual")


def test_a_second_process_measures_nothing(tmp_path: Path) -> None:
    judge(Kernels(), tmp_path / "times.json")
    again = Kernels(fake_ms=9.0)
    verdict = judge(again, tmp_path / "times.json")
    assert not again.ran
    assert verdict.taken.name == "fake" and verdict.words("fake") == "1 ms against 2 ms"
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]


@pytest.mark.parametrize("other", [MeasuredOn("another", HERE.versions), MeasuredOn("made up", {"torch": "2"})])
def test_times_of_another_device_or_version_are_ignored(
    other: MeasuredOn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    judge(Kernels(), tmp_path / "times.json", other)
    again = Kernels(fake_ms=9.0)
    with caplog.at_level(logging.WARNING):
        assert judge(again, tmp_path / "times.json").taken is None
    assert again.timed
    assert len(caplog.records) == 1 and "times.json is ignored: it was measured " in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        json.dumps({"format": 2, **dataclasses.asdict(HERE), "measured": {}}),
        json.dumps({"format": 6, **dataclasses.asdict(HERE)}),
        *(
            json.dumps(
                {"format": 6, **dataclasses.asdict(HERE), "measured": {CASE.title: {"fake": fake}}, "decisions": []}
            )
            for fake in (
                {"seconds": 1.0},
                {"wrong": None, "seconds": -1.0, "quartiles": None},
                {"wrong": 1, "seconds": None, "quartiles": None},
                {"wrong": "off", "seconds": 1.0, "quartiles": None},
                {"wrong": None, "seconds": 1.0, "quartiles": [0.5, float("inf")]},
                {"wrong": None, "seconds": None, "quartiles": [0.5, 1.0]},
            )
        ),
    ],
)
def test_a_damaged_file_is_ignored_and_replaced(text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "times.json").write_text(text)
    with caplog.at_level(logging.WARNING):
        assert judge(Kernels(), tmp_path / "times.json").taken.name == "fake"
    assert len(caplog.records) == 1 and "is ignored" in caplog.text
    assert not (again := Kernels()).ran and judge(again, tmp_path / "times.json").taken.name == "fake"
    assert not again.ran


def test_a_directory_that_cannot_be_written_is_one_line_of_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert judge(Kernels(), tmp_path / "file" / "times.json").taken.name == "fake"
    assert "times are not kept" in caplog.text


def test_the_usual_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = measurements.default_path(HERE)
    assert path.parent == tmp_path / "npu_patch" and path.name.startswith("made-up-")
    assert path != measurements.default_path(MeasuredOn("made up", {"torch": "2"}))


# Through apply(), on the CPU.


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kernels]:
    found = Kernels()
    patch = dataclasses.replace(
        rms_norm_patch.PATCH, op=dataclasses.replace(rms_norm.RMS_NORM, implementations=found.implementations)
    )
    monkeypatch.setattr(lifecycle, "CATALOGUE", (patch,))
    monkeypatch.setattr(measurer, "clock", lambda device: found.clock)
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "times.json"))
    yield found
    npu_patch.restore()


def qwen3(report: npu_patch.Report) -> npu_patch.Outcome:
    (outcome,) = (each for each in report.patched if each.site.endswith("Qwen3RMSNorm.forward"))
    return outcome


def test_auto_takes_the_faster_kernel_and_the_report_says_both_times(kernels: Kernels) -> None:
    model = tiny("qwen3")
    original = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model, device="cpu")
    outcome = qwen3(report)
    assert outcome.implementation == (
        "fake (weight, 16 float32, weight float32: 1 ms against 2 ms), "
        "fake (weight, 48 float32, weight float32: 1 ms against 2 ms)"
    )
    assert outcome.declined == {}
    found = loss_and_gradients(model, tiny_batch())
    assert set(outcome.calls.ran_by) == {"fake"} and outcome.calls.ran == outcome.calls.ran_by["fake"] > 0
    assert "1 ms against 2 ms" in str(report)
    assert apart(found, original) == {}


def test_auto_leaves_a_slower_kernel_and_says_so(kernels: Kernels) -> None:
    kernels.fake_ms = 5.0
    model = tiny("qwen3")
    outcome = qwen3(npu_patch.apply(model, device="cpu"))
    loss_and_gradients(model, tiny_batch())
    assert outcome.implementation == "usual" and set(outcome.calls.ran_by) == {"usual"}
    assert "48 float32, weight float32: 5 ms against 2 ms" in outcome.declined["fake"]


def test_sizes_that_were_not_measured_are_served_as_usual(kernels: Kernels) -> None:
    outcome = qwen3(npu_patch.apply(tiny("qwen3"), device="cpu"))
    wider = tiny("qwen3", hidden_size=64)
    loss_and_gradients(wider, tiny_batch())
    assert set(outcome.calls.ran_by) == {"fake", "usual"}  # heads are as wide as the measured ones


def test_without_a_model_none_is_taken_until_one_is_given(kernels: Kernels) -> None:
    model = tiny("qwen3")
    outcome = qwen3(npu_patch.apply(device="cpu"))
    assert (outcome.implementation, outcome.declined["fake"]) == ("usual", dispatch.NO_MODEL)
    assert not kernels.timed
    assert npu_patch.report().notes == [f"no Triton kernel is used: {dispatch.NO_MODEL}"]
    with npu_patch.applied(model, device="cpu") as report:
        assert qwen3(report) is outcome and not report.notes
        assert outcome.implementation.startswith("fake (") and "fake" not in outcome.declined
        loss_and_gradients(model, tiny_batch())
        assert set(outcome.calls.ran_by) == {"fake"}
    loss_and_gradients(model, tiny_batch())
    assert outcome.calls.ran_by["usual"] > 0


def test_a_second_apply_measures_nothing_again(kernels: Kernels) -> None:
    model = tiny("qwen3")
    first = qwen3(npu_patch.apply(model, device="cpu"))
    measured = len(kernels.timed)
    assert qwen3(npu_patch.apply(model, device="cpu")) is first
    npu_patch.restore()
    assert qwen3(npu_patch.apply(model, device="cpu")).implementation == first.implementation
    assert len(kernels.timed) == measured > 0


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        (("triton",), "this triton has no Ascend backend"),
        (("triton", "triton.backends"), "this triton has no Ascend backend"),
        (("triton", "triton.backends", "triton.backends.ascend"), None),
    ],
)
def test_the_triton_that_comes_with_torch_does_not_count(
    modules: tuple[str, ...], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npu_patch.simulator import triton_kernels

    monkeypatch.setattr(triton_kernels, "prepare", lambda: None)
    for name in ("triton", "triton.backends", "triton.backends.ascend"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in modules:
        package = types.ModuleType(name)
        package.__path__ = []
        package.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        monkeypatch.setitem(sys.modules, name, package)
    found = why_not()
    assert found is None if reason is None else found.startswith(reason)


@pytest.mark.parametrize(("triton", "name"), [(True, "fake"), (False, "usual")])
def test_one_and_zero_measure_nothing(kernels: Kernels, triton: bool, name: str) -> None:
    model = tiny("qwen3")
    outcome = qwen3(npu_patch.apply(model, device="cpu", triton=triton))
    assert outcome.implementation == name and not kernels.timed
    assert outcome.declined == ({} if triton else {"fake": "switched off by apply(triton=False)"})


@pytest.mark.parametrize(("auto", "tuned"), [("fake", "usual"), ("usual", "fake")])
def test_a_tuning_file_wins_over_auto(
    auto: str, tuned: str, kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels.fake_ms = 1.0 if auto == "fake" else 5.0
    model = tiny("qwen3")
    seen = tuning.Forced(None)
    with npu_patch.applied(model, device="cpu") as report:
        (held,) = [each for each in patched_sites(report) if each.outcome is qwen3(report)]
        held.replacement.dispatch.tuned = seen
        loss_and_gradients(model, tiny_batch())
        assert set(qwen3(report).calls.ran_by) == {auto}
    file = tmp_path / "tuned.json"
    tuning.write(file, "cpu", [tuning.Decision("rms_norm", qwen3(report).site, "weight", each, tuned) for each in seen])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    npu_patch.apply(model, device="cpu")
    kernels.ran.clear()
    loss_and_gradients(model, tiny_batch())
    assert set(kernels.ran) == {tuned}


def test_auto_and_tune_may_have_one_file(kernels: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forgets what the other found, and the decisions of `tune` go first."""
    model, seen = tiny("qwen3"), tuning.Forced(None)
    with npu_patch.applied(model, device="cpu") as report:
        (held,) = [each for each in patched_sites(report) if each.outcome is qwen3(report)]
        held.replacement.dispatch.tuned = seen
        loss_and_gradients(model, tiny_batch())
    file = tmp_path / "times.json"
    decisions = [tuning.Decision("rms_norm", qwen3(report).site, "weight", each, "usual") for each in seen]
    tuning.write(file, "cpu", decisions)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
    kernels.timed.clear()
    for size, timed in ((48, 0), (64, 2)):
        kernels.ran.clear()
        model = tiny("qwen3", hidden_size=size)
        with npu_patch.applied(model, device="cpu"):
            assert len(kernels.timed) == timed
            kernels.ran.clear()
            loss_and_gradients(model, tiny_batch())
            assert ("fake" in kernels.ran) == (size == 64)
    assert tuning.followed(str(file), tuning.content_of(str(file)), "cpu").decisions == decisions


def test_restore_leaves_the_class_as_it_was(kernels: Kernels) -> None:
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    before = vars(Qwen3RMSNorm)["forward"]
    npu_patch.apply(tiny("qwen3"), device="cpu")
    assert vars(Qwen3RMSNorm)["forward"] is not before
    npu_patch.restore()
    assert vars(Qwen3RMSNorm)["forward"] is before


def test_auto_takes_none_on_the_simulated_device_and_says_why(npu: torch.device, simulated: None) -> None:
    with npu_patch.applied(tiny("qwen3").to(npu)) as report:
        assert qwen3(report).implementation == "torch_npu.npu_rms_norm"
        assert qwen3(report).declined["triton"] == "times on the simulated device mean nothing"
        assert report.notes == ["no Triton kernel is used: times on the simulated device mean nothing"]


@pytest.mark.parametrize(
    ("before", "words"),
    [
        ("os.environ['TRITON_INTERPRET'] = '0'", "TRITON_INTERPRET='0': the simulated device needs"),
        ("sys.modules['triton'] = None", "triton cannot be imported: ModuleNotFoundError"),
    ],
)
def test_kernels_that_are_asked_for_and_cannot_run_are_a_warning(before: str, words: str, simulated: None) -> None:
    code = f"""
import os, sys
{before}
from npu_patch import simulator
simulator.start()
import npu_patch
from tests.support.tiny_models import tiny
report = npu_patch.apply(tiny("qwen3"), triton=True)
assert not report.failed and report.patched[0].implementation == "torch_npu.npu_rms_norm", report
print(report.warnings)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert f"no Triton kernel is used: {words}" in run.stdout.replace('"', "'").replace("\\'", "'")
