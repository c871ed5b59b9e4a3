"""A tuning file and the patches that fuse several sites: neither is in the other's way, and nothing goes in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npu_patch
from npu_patch.kernels.readiness import why_not
from npu_patch.measuring.tuning import ORIGINAL, Decision, write
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


def test_a_norm_that_the_file_leaves_original_is_why_nothing_is_fused(
    npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3").to(npu)
    with npu_patch.applied(model, triton=True) as report:
        norm = site(report, "rms_norm")
    write(tmp_path / "tuned.json", "npu", [Decision("rms_norm", norm.site, norm.variant, UNSEEN, ORIGINAL)])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    for triton in (True, False):
        report = npu_patch.apply(model, triton=triton)
        said = [line for line in report.notes if f"does not serve layers with {norm.site}: tuned: the original" in line]
        assert [line.split(" ")[0] for line in said] == (list(FUSED) if triton else [])
        npu_patch.restore()


@pytest.mark.parametrize("patch", FUSED)
def test_a_decision_on_a_fused_patch_is_refused_when_the_file_is_read(
    patch: str, npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3").to(npu)
    write(tmp_path / "tuned.json", "npu", [Decision(patch, "m.Attention.forward", "any", UNSEEN, "triton")])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    report = npu_patch.apply(model, triton=True)
    (warning,) = report.warnings
    assert f"is not used: it decides on {patch}, which cannot be tuned; what can is rms_norm, rope" in warning
    loss_and_gradients(model, tiny_batch(length=5))
    assert all(ran(report)[each] > 0 for each in FUSED)
