"""What `print(report)`, `report.json()`, `report.to_html()` and the log say, as a user reads them."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

import npu_patch
from npu_patch import log
from npu_patch.reporting.outcome import FAILED, PATCHED, SKIPPED, Outcome
from npu_patch.reporting.report import Report
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch, with_forwards_of_their_own


@pytest.fixture(autouse=True)
def nothing_left_applied() -> Iterator[None]:
    log.forget()
    yield
    npu_patch.restore()


@pytest.fixture(scope="module")
def large_moe() -> torch.nn.Module:
    """Qwen3-235B-A22B without weights: 94 layers of 128 experts."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=4096,
        num_hidden_layers=94,
        num_experts=128,
        num_attention_heads=64,
        num_key_value_heads=4,
        moe_intermediate_size=1536,
        head_dim=128,
    )
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


def words(text: str) -> str:
    return " ".join(text.split())


def test_a_moe_of_94_layers_fits_one_screen(npu: torch.device, large_moe: torch.nn.Module) -> None:
    report = npu_patch.apply(large_moe, lora=False)  # it has no adapters
    text = str(report)
    lines = text.splitlines()
    others = [o for o in report if o.site.startswith(("trl.", "transformers.trainer"))]  # if another test imported them
    assert len(lines) - 2 * len(others) <= 40
    assert max(map(len, lines)) <= 100
    assert re.search(r"rms_norm +Qwen3MoeRMSNorm +377 +0 +0\n +weight -> torch_npu.npu_rms_norm\n", text)
    assert re.search(r"ExpertsInterface\['grouped_mm'\] +94 ", text)
    sites = 34 + len(others)
    assert f"{sites} sites: {sites} patched, 0 skipped, 0 failed" in lines[0]


def test_counters_are_live_after_training(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    report = npu_patch.apply(model)
    assert re.search(r"Qwen3RMSNorm +9 +0 +0\n", str(report))
    loss_and_gradients(model, tiny_batch())
    assert re.search(r"Qwen3RMSNorm +9 +9 +0\n", str(report))
    (norm,) = [entry for entry in json.loads(report.json())["outcomes"] if entry["patch"] == "rms_norm"]
    assert (norm["status"], norm["layers"], norm["ran"], norm["fell_through"]) == ("patched", 9, 9, {})
    assert norm["declined"] == {
        "triton": "times on the simulated device mean nothing",
        "torch.nn.functional.rms_norm": "serves cuda, cpu only",
    }


def test_a_mask_that_nobody_needs_did_not_fall_through(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    report = npu_patch.apply(model)
    loss_and_gradients(model, tiny_batch())
    (mask,) = [outcome for outcome in report if outcome.site == "AttentionMaskInterface['sdpa']"]
    assert (mask.calls.ran, mask.calls.fell_through.total()) == (1, 0)
    padded = tiny_batch() | {"attention_mask": torch.tensor([[0] * 3 + [1] * 10, [1] * 13])}
    loss_and_gradients(model, padded)
    assert dict(mask.calls.fell_through) == {"a mask for padding": 1}


def made_up() -> Report:
    norms = [
        Outcome("rms_norm", f"m.Norm{i}.forward", PATCHED, "", "weight", "npu_rms_norm", layers=2) for i in range(9)
    ]
    norms[0].calls.ran, norms[1].calls.ran = 5, 7
    norms[0].calls.fell_through["input on <cpu>"] = 3
    skipped = [Outcome("rms_norm", f"m.Odd{i}.forward", SKIPPED, "it is 0.1 tolerances & more away") for i in range(40)]
    experts = [Outcome("experts", "m.Experts", SKIPPED, "asks for eager") for _ in range(94)]
    failed = [Outcome("rope", "m.rotate", FAILED, "LookupError: " + "broken " * 40)]
    return Report("npu", [*norms, *skipped, *experts, *failed], ["a note"], ["a warning"])


def test_each_reason_is_said_once() -> None:
    text = str(made_up())
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("tolerances & more away") == 1 and text.count("asks for eager") == 1
    assert re.search(r"Norm0 +2 +5 +3\n", text) and re.search(r"Norm1 +2 +7 +0\n", text)
    assert re.search(r"never called: Norm2, Norm3, Norm4 and 4 more +14 +0 +0\n", text)
    assert "3 fell through: input on <cpu>" in text
    assert "skipped: Odd0, Odd1, Odd2 and 37 more" in text
    assert "skipped: Experts x 94" in text
    assert "failed: rotate" in text and words(text).count("broken") == 40
    assert text.endswith("note: a note\nWARNING: a warning")
    assert text.startswith("npu_patch on npu: 144 sites: 9 patched, 134 skipped, 1 failed")


def test_sites_without_a_layer_are_counted_apart() -> None:
    outcomes = [Outcome("rms_norm", f"m.Norm{layers}.forward", PATCHED, layers=layers) for layers in (0, 2, None)]
    text = words(str(Report("npu", outcomes)))
    assert text.startswith(
        "npu_patch on npu: 3 sites: 3 patched, 0 skipped, 0 failed; 1 of the patched without a layer"
    )


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


def test_the_page_holds_the_rows_and_escapes(tmp_path: Path) -> None:
    page = made_up().to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == page
    cells = Cells()
    cells.feed(page)
    assert cells.rows[0] == ["patch", "status", "sites", "layers", "ran", "fell through"]
    assert cells.rows[1][3:] == ["2", "5", "33 x input on <cpu>"]
    assert cells.rows[-1][1:5] == ["never called", ", ".join(f"Norm{index}" for index in range(2, 9)), "14", "0"]
    assert len(cells.rows) == 7
    assert "<cpu>" not in page and "<script" not in page and "http" not in page


def test_the_log_says_each_fact_once(npu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "npu_patch")
    model = with_forwards_of_their_own(tiny("qwen3"))
    npu_patch.apply(model)
    npu_patch.apply(model)
    assert {record.name for record in caplog.records} == {"npu_patch"}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1
    assert caplog.text.count("swiglu: nothing in Qwen3ForCausalLM is served") == 1
    assert caplog.text.count("patched, 1 skipped, 0 failed") == 1


@pytest.mark.parametrize("known_by", ["launcher", "torch.distributed"])
def test_only_the_first_process_speaks(
    known_by: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if known_by == "launcher":
        monkeypatch.setenv("RANK", "3")
    else:
        group = SimpleNamespace(is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 3)
        monkeypatch.setattr(torch, "distributed", group)
    log.warning("something")
    assert not caplog.records
    monkeypatch.setattr(log, "EVERY_RANK", True)
    log.warning("something")
    assert caplog.messages == ["something"]


def test_the_report_needs_no_other_package() -> None:
    program = """
import sys
for name in ("rich", "torch", "transformers"):
    sys.modules[name] = None
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
report = Report("npu", [Outcome("rope", "m.rotate", "skipped", "no rope")])
print(report, report.to_html(), report.json())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "skipped: rotate" in done.stdout
