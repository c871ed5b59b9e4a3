"""A training script that nobody edited, started as people start theirs: patched by a variable or by `run`."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.support.installed import PYTHON, ROOT, installed

JOB = str(ROOT / "tests" / "support" / "trainer_job.py")
TWO_RANKS = ("torchrun", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("--devices", "2", "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no",
              "--dynamo_backend", "no")  # fmt: skip
RUN = ("npu_patch", "run", "--report", "report.json", "--no-swiglu")
NEAR = 1e-5


def losses_of(job: tuple[str, ...], folder: Path, **environment: str) -> dict[str, Any]:
    told = {**installed(folder / "installed"), **environment}
    done = subprocess.run(
        [*PYTHON, *job, "losses.json"], cwd=folder, env=told, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((folder / "losses.json").read_text()) | {"said": done.stderr}


@pytest.fixture(scope="module")
def unpatched(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[float]]:
    """By the number of ranks."""
    jobs = {1: (JOB,), 2: (*TWO_RANKS, JOB)}
    found = {ranks: losses_of(job, tmp_path_factory.mktemp(str(ranks))) for ranks, job in jobs.items()}
    assert [each["ranks"] for each in found.values()] == [1, 2]
    return {ranks: each["losses"] for ranks, each in found.items()}


BY_VARIABLE = {"TWINKLE_NPU_AUTO": "1", "TWINKLE_NPU_REPORT": "report.json", "TWINKLE_NPU_SWIGLU": "0"}


@pytest.mark.parametrize(
    ("job", "environment"),
    [
        ((JOB,), BY_VARIABLE),
        (("-m", *RUN, JOB), {}),
        ((*TWO_RANKS, "-m", *RUN, JOB), {}),
        (("-m", *RUN, *TWO_RANKS, JOB), {}),
        ((*ACCELERATE, JOB), BY_VARIABLE),
    ],
    ids=["variable", "run", "torchrun run", "run torchrun", "accelerate, variable"],
)
def test_a_job_that_nobody_edited_is_patched_and_computes_the_same(
    job: tuple[str, ...], environment: dict[str, str], tmp_path: Path, unpatched: dict[int, list[float]]
) -> None:
    found = losses_of(job, tmp_path, **environment)
    expected = unpatched[found["ranks"]]
    assert found["ranks"] == (2 if {"torchrun", "--multi_gpu"} & set(job) else 1)
    assert found["losses"] == pytest.approx(expected, rel=NEAR)
    outcomes = json.loads((tmp_path / "report.json").read_text())["outcomes"]
    ran = {outcome["site"].rsplit(".", 2)[-2]: outcome["ran"] for outcome in outcomes if outcome["patch"] == "rms_norm"}
    assert ran["Qwen3RMSNorm"] >= 3 * 9
    assert not [outcome for outcome in outcomes if outcome["patch"] == "swiglu"]


def test_the_report_is_printed_when_the_job_ends(tmp_path: Path, unpatched: dict[int, list[float]]) -> None:
    found = losses_of((*TWO_RANKS, JOB), tmp_path, TWINKLE_NPU_AUTO="report")
    assert found["said"].count("npu_patch on npu") == 1  # by the first rank, and not by the launcher
    assert "Qwen3RMSNorm" in found["said"]
    assert found["losses"] == pytest.approx(unpatched[2], rel=NEAR)
