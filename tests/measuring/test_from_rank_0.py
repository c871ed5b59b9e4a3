"""Of the ranks of a job the first measures; the others take what it found, or say why they did not."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import npu_patch
from npu_patch import simulator
from npu_patch.applying.state import patched_sites
from npu_patch.measuring import from_rank_0, measurer, self_check, tuning
from npu_patch.measuring.from_rank_0 import Job
from npu_patch.measuring.measured_on import here
from npu_patch.measuring.measurements import FORMAT, Measurements
from npu_patch.serving.case import Measured
from tests.support.tiny_models import tiny

pytestmark = pytest.mark.usefixtures("simulated")


@pytest.fixture
def applied(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, npu: torch.device
) -> Iterator[Callable[[Job | None], tuple[list[str], npu_patch.Report]]]:
    """What a rank checks as it patches a model, in a home of its own, and its report."""
    checked: list[str] = []
    genuine = measurer.check

    def watched(case: Any, alternative: Any, device: torch.device) -> Measured:
        checked.append(f"{case.title}, {alternative.name}")
        return genuine(case, alternative, device)

    monkeypatch.setattr(measurer, "check", watched)
    monkeypatch.setattr(self_check, "BUDGET_S", 600.0)
    monkeypatch.setattr(from_rank_0, "WAIT_S", 0.5)
    monkeypatch.setenv("TWINKLE_NPU_SELF_CHECK", "1")
    homes = iter(range(9))

    def apply(job: Job | None, family: str = "llama") -> tuple[list[str], npu_patch.Report]:
        checked.clear()
        monkeypatch.setattr(from_rank_0, "job", lambda: job)
        monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / f"{next(homes)}.json"))
        report = npu_patch.apply(tiny(family, num_hidden_layers=1).to(npu))
        wrong = [each for held in patched_sites() for each in getattr(held.replacement.dispatch, "wrong", {})]
        npu_patch.restore()
        return [*checked, *(f"wrong: {name}" for name, _ in wrong)], report

    yield apply


def test_the_second_rank_measures_nothing_and_knows_what_is_wrong(applied: Callable[..., Any]) -> None:
    store = dist.HashStore()
    with simulator.wrong_operator("npu_rms_norm", factor=1.05):
        first, _ = applied(Job(store, 0))
    assert "wrong: torch_npu.npu_rms_norm" in first and len(first) > 4
    second, report = applied(Job(store, 1))  # whose own operator is right: all ranks are served alike
    assert set(second) == {"wrong: torch_npu.npu_rms_norm"}
    assert not [note for note in report.notes if "rank 0" in note]


def test_what_the_first_rank_did_not_have_is_measured(applied: Callable[..., Any]) -> None:
    """Parts of a model are on several ranks."""
    store = dist.HashStore()
    assert not [each for each in applied(Job(store, 0))[0] if each.startswith("experts")]
    second, _ = applied(Job(store, 1), "qwen3_moe")
    assert [each for each in second if each.startswith("experts")]
    job = Job(store, 0)
    job.next_turn("measured")
    job.give(job.next_turn("measured"), None)  # an apply() that had nothing to decide
    assert applied(Job(store, 1, Counter(measured=1)))[0]


@pytest.mark.parametrize("why", ["silent", "another chip", "nonsense"])
def test_a_rank_that_gets_nothing_from_the_first_measures_for_itself_and_says_so(
    why: str, applied: Callable[..., Any], npu: torch.device
) -> None:
    store = dist.HashStore()
    kept = Measurements(Path("nowhere"), here(npu))
    if why == "another chip":
        content = {"format": FORMAT, "chip": "Ascend310", "versions": {}, "measured": {}, "decisions": []}
        store.set("npu_patch/measured/1", json.dumps(content))
    elif why == "nonsense":
        store.set("npu_patch/measured/1", '{"format": 1}')
    words = {
        "silent": "rank 0 did not say within 0.5 s what it measured: this rank measured for itself",
        "another chip": f"it was measured on Ascend310, this is {kept.measured_on.chip}",
        "nonsense": "which measured for itself: its format is 1, this npu_patch reads",
    }
    found, report = applied(Job(store, 1))
    assert found
    assert [note for note in report.notes if words[why] in note]


def test_a_rank_whose_file_knows_everything_waits_for_nobody(
    applied: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, npu: torch.device, tmp_path: Path
) -> None:
    assert applied(None)[0]
    monkeypatch.setattr(Job, "take", lambda *arguments: pytest.fail("waits"))
    monkeypatch.setattr(from_rank_0, "job", lambda: Job(dist.HashStore(), 1))
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "0.json"))
    npu_patch.apply(tiny("llama", num_hidden_layers=1).to(npu))


@pytest.fixture
def followed(monkeypatch: pytest.MonkeyPatch, npu: torch.device) -> Callable[..., npu_patch.Report]:
    """The report of a rank that is given a tuning file, or none."""
    monkeypatch.setattr(from_rank_0, "WAIT_S", 0.5)

    def apply(job: Job, file: Path | None) -> npu_patch.Report:
        monkeypatch.setattr(from_rank_0, "job", lambda: job)
        if file is None:
            monkeypatch.delenv("TWINKLE_NPU_TUNE", raising=False)
        else:
            monkeypatch.setenv("TWINKLE_NPU_TUNE", str(file))
        with npu_patch.applied(tiny("llama", num_hidden_layers=1).to(npu)) as report:
            return report

    return apply


def tuned(path: Path, choice: str) -> Path:
    signature = tuning.signature_of(torch.zeros(5, 72), torch.zeros(5, 72))
    site = "transformers.models.llama.modeling_llama.LlamaMLP.forward"
    tuning.write(path, "npu", [tuning.Decision("swiglu", site, SWIGLU, signature, choice)])
    return path


SWIGLU = "gate and up"


def decided(report: npu_patch.Report) -> str:
    (found,) = [each for each in report if each.patch == "swiglu" and each.site.endswith("LlamaMLP.forward")]
    return found.reason or found.tuned


@pytest.mark.parametrize("own", ["another", "missing", "none"])
def test_every_rank_follows_the_tuning_file_of_the_first(
    own: str, followed: Callable[..., npu_patch.Report], tmp_path: Path
) -> None:
    """Whatever its own host has under that name; one that is told of none waits for nobody."""
    store, other = dist.HashStore(), tuned(tmp_path / "own.json", "torch_npu.npu_swiglu")
    first = followed(Job(store, 0), tuned(tmp_path / "first.json", "original"))
    second = followed(Job(store, 1), {"another": other, "missing": tmp_path / "no", "none": None}[own])
    if own == "none":
        assert second.tuning is None and not second.warnings
        return
    assert decided(second) == decided(first) == "tuned: original"
    assert second.tuning is not None and second.tuning.digest == first.tuning.digest


def test_a_rank_follows_no_tuning_file_where_the_first_has_none(
    followed: Callable[..., npu_patch.Report], tmp_path: Path
) -> None:
    store, file = dist.HashStore(), tuned(tmp_path / "own.json", "original")
    followed(Job(store, 0), None)
    report = followed(Job(store, 1), file)
    assert report.tuning is None and report.warnings == [f"the tuning file {file} is not used: rank 0 follows none"]


def test_a_rank_that_is_not_told_reads_its_own_tuning_file_and_says_so(
    followed: Callable[..., npu_patch.Report], tmp_path: Path
) -> None:
    file = tuned(tmp_path / "own.json", "original")
    report = followed(Job(dist.HashStore(), 1), file)
    assert decided(report) == "tuned: original"
    said = f"rank 0 did not say within 0.5 s what it tuned: this rank reads {file} for itself"
    assert said in report.notes


def test_a_process_of_its_own_is_no_job(tmp_path: Path) -> None:
    assert from_rank_0.job() is None
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    try:
        assert from_rank_0.job() is None
    finally:
        dist.destroy_process_group()
