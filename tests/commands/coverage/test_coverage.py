"""python -m npu_patch coverage: that it says what apply() does, of one family and of all of transformers."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import npu_patch
from npu_patch.applying.dry_run import dry_run
from npu_patch.commands import main
from npu_patch.commands.console.result import Result
from npu_patch.commands.coverage import command as coverage
from npu_patch.commands.coverage.survey import Tally, cell, survey
from npu_patch.reporting.report import Report
from npu_patch.sites.late_imports import is_modeling_module
from npu_patch.sites.sites import loaded_modules, modules_of_model
from tests.support.tiny_models import tiny

# With norms that nothing computes, experts of their own, gated delta nets, vision, GELU.
FAMILIES = ("qwen3_5", "qwen3_moe", "mamba2", "gemma3", "gpt_oss", "kimi_linear", "longcat_flash", "bamba", "glm4v")


def told(report: Report) -> list[tuple[object, ...]]:
    return sorted(
        (o.patch, o.site, o.status, o.reason, o.variant, o.implementation, str(o.layers), str(o.declined))
        for o in report
    )


def test_a_dry_run_says_what_apply_does_to_every_loaded_module(npu: torch.device) -> None:
    for family in FAMILIES:
        name = f"transformers.models.{family}.modeling_{family}"
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    dry = dry_run(loaded_modules(is_modeling_module))
    applied = npu_patch.apply()
    assert len(applied.patched) > 20 and len(applied.skipped) > 2
    assert told(dry) == told(applied)


@pytest.mark.parametrize("family", ["qwen3_5_moe", "gemma3"])
def test_a_dry_run_of_a_model_says_what_apply_does(family: str, npu: torch.device) -> None:
    model = tiny(family)
    dry = dry_run(modules_of_model(model), model)
    applied = npu_patch.apply(model)
    assert told(dry) == told(applied)
    assert dry.warnings == applied.warnings


def test_a_dry_run_leaves_everything_as_it_is(npu: torch.device) -> None:
    model = tiny("qwen3_5")
    (module,) = modules_of_model(model)
    before = {name: dict(vars(value)) if isinstance(value, type) else value for name, value in vars(module).items()}
    report = dry_run([module], model)
    after = {name: dict(vars(value)) if isinstance(value, type) else value for name, value in vars(module).items()}
    assert len(report.patched) > 5 and after == before
    assert not npu_patch.report().outcomes
    npu_patch.apply(model)
    with pytest.raises(npu_patch.PatchError, match="patches are in place"):
        dry_run([module])


def test_one_family_is_shown_as_apply_would_report_it(
    npu: torch.device, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    assert main(["coverage", "qwen3", "--html", str(page)]) == 0
    text = capsys.readouterr().out
    assert "npu_patch on npu, dry run" in text
    layers = 4 * transformers.Qwen3Config().num_hidden_layers + 1
    assert any(line.split()[:3] == ["rms_norm", "Qwen3RMSNorm", str(layers)] for line in text.splitlines())
    assert "Qwen3RMSNorm" in page.read_text()
    assert main(["coverage", "qwen3", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["modules"] == ["transformers.models.qwen3.modeling_qwen3"]
    assert {outcome["patch"] for outcome in content["outcomes"]} - {"lora"} == {  # where another test imported peft
        "rms_norm",
        "rope",
        "swiglu",
        "attention",
        "captured_decode",
        "static_cache",
        "generate_batch",
        "experts",
        "cross_entropy",
        "w8a8_loading",
    }


def test_families_are_added_up() -> None:
    names = {name: (f"transformers.models.{name}.modeling_{name}",) for name in ("qwen3_moe", "gemma3", "no_such")}
    moe, gemma, missing = survey(names, processes=1)
    assert moe.patches["rms_norm"] == Tally(patched=1, variants={"weight": 1})
    assert moe.patches["experts"].by_registry == 1 and moe.patches["attention"].by_registry == 1
    assert cell(gemma.patches["swiglu"]) == "1" and cell(None) == ""
    assert cell(Tally(patched=2, skipped=1)) == "2 of 3"
    assert "no_such" in missing.errors[0] and not missing.patches


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen-3"], "MODEL 'qwen-3' is no model type of the installed transformers; near names: qwen3,"),
        (["--all", "--html", "/no/such/folder/x.html"], "--html /no/such/folder/x.html: there is no folder"),
        (["qwen3", "--html", "/tmp"], "--html /tmp: that is a folder; a file is wanted"),
    ],
)
def test_bad_usage_is_told_what_is_accepted(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["coverage", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_json_alone_reaches_stdout_whatever_libraries_print(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chatty(options: argparse.Namespace) -> Result:
        print("a library says hello")
        return Result({"family": "none"}, lambda: [], fine=True)

    monkeypatch.setattr(coverage, "run", chatty)
    assert main(["coverage", "qwen3", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"family": "none"}
    assert "a library says hello" in printed.err


def test_neither_a_type_nor_all_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["coverage"])
    assert stopped.value.code == 2
    assert "MODEL --all is required" in capsys.readouterr().err


def test_all_families_without_a_device_in_little_time_and_memory(tmp_path: Path) -> None:
    """Processor time, which other work on the machine does not lengthen; where CANN is absent, torch_npu stays out."""
    command = [sys.executable, "-m", "npu_patch", "coverage", "--all", "--json", "--html", str(tmp_path / "all.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["modules"] >= 400
    assert content["cpu_seconds"] < 60 and content["peak_gib"] < 4
    totals = content["totals"]
    if content["transformers"] == "5.23.0":
        patched = {name: total["patched"] + total["by_registry"] for name, total in totals.items()}
        assert patched["rms_norm"] >= 207 and patched["rope"] >= 224 and patched["swiglu"] >= 162
        assert patched["experts"] >= 67 and patched["attention"] >= 447 and patched["gated_delta_net"] >= 64
    assert not any(total["failed"] for total in totals.values())
    assert content["families"]["qwen3_next"]["patches"]["gated_delta_net"]["patched"] > 0
    page = (tmp_path / "all.html").read_text()
    assert page.count("<tr>") == 1 + len(content["families"])


def test_switched_off_coverage_says_by_what(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TWINKLE_NPU_PATCH", "0")
    assert main(["coverage", "qwen3"]) == 0
    assert "nothing was rebound: switched off by TWINKLE_NPU_PATCH" in " ".join(capsys.readouterr().out.split())
