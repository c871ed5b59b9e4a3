"""A tuning file and the patches that fuse several sites: neither is in the other's way, and nothing goes in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npu_patch
from npu_patch.applying.state import patched_sites
from npu_patch.kernels.readiness import why_not
from npu_patch.measuring.decision import ORIGINAL
from npu_patch.measuring.tuning import Decision, Forced, write
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.tiny_models import tiny, tiny_batch

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.usefixtures("two_cores")
FUSED = ("qk_norm_rope", "add_rms_norm")
UNSEEN = (("grad", ()), (torch.float32, (999, 999)))


def site(report: Report, patch: str) -> Outcome:
    (found,) = [o for o in report if o.patch == patch and (o.layers or o.site.endswith(".apply_rotary_pos_emb"))]
    return found


def ran(report: Report) -> dict[str, int]:
    return {patch: sum(o.calls.ran for o in report if o.patch == patch) for patch in ("rms_norm", "rope", *FUSED)}


@pytest.mark.parametrize("chosen", ["usual", "usual and original"])
@pytest.mark.parametrize("patch", ["rms_norm", "rope"])
def test_fused_patches_stay_for_shapes_that_the_file_does_not_decide_on(
    patch: str, chosen: str, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = tiny("qwen3").to(npu), tiny_batch(length=5)
    with npu_patch.applied(model, triton=True) as report:
        expected = loss_and_gradients(model, batch)
        before, tuned = ran(report), site(report, patch)
    signatures = {"usual": [UNSEEN], "usual and original": [UNSEEN, (*UNSEEN, UNSEEN[1])]}[chosen]
    choices = (tuned.implementation, ORIGINAL)
    made = [
        Decision(patch, tuned.site, tuned.variant, signature, choice)
        for signature, choice in zip(signatures, choices, strict=False)
    ]
    write(tmp_path / "tuned.json", "npu", made)
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    report = npu_patch.apply(model, triton=True)
    found = loss_and_gradients(model, batch)
    assert not report.warnings and report.tuning is not None
    assert ran(report) == before and all(before[each] > 0 for each in FUSED)
    assert max(relative_error(found[name], expected[name]) for name in expected) == 0.0


def test_a_norm_that_the_file_leaves_original_takes_part_in_what_is_fused(
    npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without kernels nothing is built on it, and it is not bound at all."""
    model, batch = tiny("qwen3").to(npu), tiny_batch(length=5)
    with npu_patch.applied(model, triton=True) as report:
        loss_and_gradients(model, batch)
        norm, before = site(report, "rms_norm"), ran(report)
    write(tmp_path / "tuned.json", "npu", [Decision("rms_norm", norm.site, norm.variant, UNSEEN, ORIGINAL)])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    with npu_patch.applied(model, triton=True) as report:
        loss_and_gradients(model, batch)
        assert {patch: ran(report)[patch] for patch in FUSED} == {patch: before[patch] for patch in FUSED}
    with npu_patch.applied(model, triton=False) as report:
        assert site(report, "rms_norm").reason == "tuned: original"


@pytest.mark.parametrize("choice", ["triton", ORIGINAL])
@pytest.mark.parametrize("patch", FUSED)
def test_a_decision_on_a_kernel_that_waits_is_followed_call_by_call(
    choice: str, patch: str, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one bucket; the other calls go as without the file."""
    model, batch, seen = tiny("qwen3").to(npu), tiny_batch(length=5), Forced(None)
    expected = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        outcome = site(report, patch)
        (held,) = [each for each in patched_sites(report) if each.outcome is outcome]
        held.replacement.dispatch.tuned = seen
        loss_and_gradients(model, batch)
    assert len(seen) == 1
    other = ORIGINAL if choice == "triton" else "triton"  # for shapes that never come: the site stays bound
    decided = [(*seen, choice), (UNSEEN, other)]
    write(
        tmp_path / "tuned.json",
        "npu",
        [Decision(patch, outcome.site, outcome.variant, signature, name) for signature, name in decided],
    )
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    report = npu_patch.apply(model, triton=True)
    found = loss_and_gradients(model, batch)
    assert max(relative_error(found[name], expected[name]) for name in expected) < 1e-4
    calls = site(report, patch).calls
    assert calls.tuned == 2
    assert (calls.ran, calls.fell_through) == ((2, {}) if choice == "triton" else (0, {"tuned: original": 2}))
    loss_and_gradients(model, tiny_batch(length=19))
    assert (calls.ran, calls.tuned) == ((4, 2) if choice == "triton" else (2, 2))
