"""Whether `apply()` runs in scripts that nobody edits, and what keeps it from that, as a doctor says it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from npu_patch.commands import main
from npu_patch.commands.doctor.faults import complaints, why_not_by_itself
from npu_patch.commands.doctor.processes import Answer
from tests.commands.doctor.test_doctor import HEALTHY, SOUND, WORKS, environment

DECLARED = Answer(["torch_npu", "npu_patch"])
WANTED = {"TWINKLE_NPU_AUTO": "report"}
DOES_NOTHING = "TWINKLE_NPU_AUTO=report does nothing: "


@pytest.mark.parametrize(
    ("change", "closed_by", "complaint"),
    [
        ({"entries": DECLARED, "environ": WANTED}, None, None),
        ({"entries": DECLARED}, "TWINKLE_NPU_AUTO is not set", None),
        ({"entries": DECLARED, "environ": {"TWINKLE_NPU_AUTO": "no"}}, "switched off by TWINKLE_NPU_AUTO", None),
        ({"entries": Answer(["torch_npu"]), "environ": WANTED}, "no installed distribution declares", DOES_NOTHING),
        ({"entries": Answer(error="it hangs"), "environ": WANTED}, "entry points cannot be told: it", DOES_NOTHING),
        ({"entries": DECLARED, "environ": WANTED | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}},
         "TORCH_DEVICE_BACKEND_AUTOLOAD='0' keeps torch from calling it", DOES_NOTHING),
        ({"entries": DECLARED, "environ": WANTED, "distributions": (("torch", "2.4.1+cpu", "x"),)},
         "torch 2.4.1 calls no entry points", DOES_NOTHING),
        ({"environ": {"TWINKLE_NPU_AUTO": "maybe"}}, "TWINKLE_NPU_AUTO='maybe': accepted are report, 1/true", ""),
    ],
    ids=["open", "not set", "switched off", "not declared", "not told", "torch told not to", "old torch", "wrong word"],
)  # fmt: skip
def test_the_doctor_says_what_closes_it_and_complains_where_it_is_wanted(
    change: dict[str, object], closed_by: str | None, complaint: str | None
) -> None:
    findings = replace(SOUND, **change)
    found = why_not_by_itself(findings)
    assert found is None if closed_by is None else found is not None and found.startswith(closed_by)
    said = [each.what for each in complaints(findings) if each.fault == "patching by itself"]
    assert said == ([] if complaint is None else [f"{complaint}{found}"])


@pytest.mark.parametrize("declared", [True, False])
def test_an_interpreter_is_asked_what_its_torch_calls(
    declared: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_AUTO", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    python = environment(tmp_path / "venv", {name: (version, WORKS) for name, (version, _) in HEALTHY.items()})
    if declared:
        (information,) = tmp_path.glob("venv/lib/python*/site-packages/torch-*.dist-info")
        (information / "entry_points.txt").write_text("[torch.backends]\nnpu_patch = npu_patch.autoload:autoload\n")
    main(["doctor", "--python", python, "--json"])
    assert json.loads(capsys.readouterr().out)["by_itself"]["open"] is declared
    main(["doctor", "--python", python])
    word = "yes" if declared else "no: no installed distribution declares"
    assert f"apply() by itself, once transformers is imported: {word}" in " ".join(capsys.readouterr().out.split())
