"""python -m npu_patch count MODEL --images N: a step on drawn images, and the tower's part of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch.commands import main
from npu_patch.commands.subject.vision.families import FAMILIES

pytestmark = pytest.mark.usefixtures("simulated", "leaving_nothing_applied")

ROOT = Path(__file__).parents[3]
WAYS = ("unpatched", "patched")


def counted(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code = main(["count", *arguments, "--json"])
    content = json.loads(capsys.readouterr().out)
    assert code == 0, content
    return content["steps"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_is_a_part_of_the_step_and_patched_costs_no_more(
    family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = counted(capsys, family, "--images", "2")
    assert set(steps) == {"training step", "tower"}
    for way in WAYS:
        tower, step = (steps[name][way]["total"] for name in ("tower", "training step"))
        assert 0 < tower["launches"] < step["launches"] and 0 < tower["bytes"] < step["bytes"]
        assert tower["host_waits"] <= step["host_waits"]
        assert not any("lm_head" in layer for layer in steps["tower"][way]["by_layer"])
    for step in steps.values():
        unpatched, patched = (step[way]["total"] for way in WAYS)
        assert patched["launches"] < unpatched["launches"] or step is steps["tower"]
        for measure in ("launches", "host_waits", "peak_bytes"):
            assert patched[measure] <= unpatched[measure], measure


def test_more_images_cost_more_and_adapters_other_than_full(capsys: pytest.CaptureFixture[str]) -> None:
    one, three = (counted(capsys, "qwen2_5_vl", "--images", images)["tower"] for images in ("1", "3"))
    adapted = counted(capsys, "qwen2_5_vl", "--images", "1", "--lora")["tower"]
    for way in WAYS:
        assert one[way]["total"]["bytes"] < three[way]["total"]["bytes"]
        assert adapted[way]["total"]["launches"] != one[way]["total"]["launches"]


def test_the_script_prints_the_ratio_of_each_measure(tmp_path: Path) -> None:
    script, found = ROOT / "scripts" / "bench_vision.py", tmp_path / "counts.json"
    command = [sys.executable, str(script), "--families", "gemma3", "--images", "1", "--output", str(found)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    totals = json.loads(found.read_text())["gemma3"]["training step"]
    before, after = (totals[way]["launches"] for way in WAYS)
    row = [f"{before:,.2f}", f"{after:,.2f}", f"{after / before:.2f}"]
    assert ["training", "step", "launches", *row] in [line.split() for line in done.stdout.splitlines()]


def test_the_script_times_each_way_on_one_tower_in_turns(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("bench_vision", ROOT / "scripts" / "bench_vision.py")
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_vision", script)
    spec.loader.exec_module(script)
    small = {"depth": 2, "hidden_size": 48, "intermediate_size": 88, "num_heads": 2, "out_hidden_size": 64}
    errors: list[float] = []
    for name, tower in script.TOWERS.items():
        tiny = dataclasses.replace(tower, sizes=tower.sizes | small | {"patch_size": 4}, sides=(24, 32))
        costs = script.timed_tower(tiny, "npu", False)
        assert list(costs) == ["sdpa", "sdpa, patched"]
        assert {(len(cost.forward), len(cost.step)) for cost in costs.values()} == {(15, 15)}
        assert costs["sdpa"].error == 0.0 and costs["sdpa, patched"].error < 2**-6
        errors.append(costs["sdpa, patched"].error)
        script.print_times(name, "npu", {way: dataclasses.asdict(cost) for way, cost in costs.items()})
    assert max(errors) > 0  # by roundings: the patched way is another one
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  sdpa")]
    assert len(rows) == 4 and rows[0].count("=  1.00") == 2 and all("GiB" in row for row in rows)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("llama", "--images", "1"), "'llama' is no family with pictures: accepted are qwen2_vl, "),
        (("qwen2_vl", "--images", "-1"), "--images -1: accepted are numbers from 0"),
        (("qwen2_vl", "--images", "1", "--real"), "--images: accepted are no --real, --size, --packed and --padding"),
    ],
)
def test_what_cannot_be_counted_is_refused(
    arguments: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["count", *arguments]) == 2
    assert error in " ".join(capsys.readouterr().err.split())
