"""scripts/vendor_tests.py counts what a folder of unit tests does on the simulated NPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("simulated")

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "vendor_tests.py"

OUTCOMES = """
import unittest
import torch

class TestOutcomes(unittest.TestCase):
    def test_a_passes(self):
        self.assertEqual(torch.ones(2, device="npu").sum().item(), 2)

    def test_b_fails(self):
        self.assertEqual(1, 2)

    def test_c_is_skipped(self):
        raise unittest.SkipTest("not on this chip")

    def test_d_raises(self):
        raise ValueError("two\\nlines")

    def test_e_has_parts(self):
        for part in range(3):
            with self.subTest(part=part):
                self.assertNotEqual(part, 1)
"""
CRASH = """
import os, unittest

class TestCrash(unittest.TestCase):
    def test_a_passes(self):
        pass

    def test_b_takes_the_process_along(self):
        os._exit(3)
"""
SLOW = """
import time, unittest

class TestSlow(unittest.TestCase):
    def test_a_passes(self):
        pass

    def test_b_waits(self):
        time.sleep(600)
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def checkout(folder: Path, **files: str) -> Path:
    tests = folder / "test" / "test_base_ops"
    tests.mkdir(parents=True)
    for name, source in files.items():
        (tests / f"test_{name}.py").write_text(source)
    return folder


def test_outcomes_crashes_and_time_limits_are_counted(tmp_path: Path) -> None:
    where = checkout(tmp_path / "plugin", outcomes=OUTCOMES, crash=CRASH, slow=SLOW, other="raise SystemExit(1)")
    counts = tmp_path / "counts.json"
    done = run(where, "outcomes", "*test_crash.py", "slow", "--timeout", "45", "--json", counts)
    assert done.returncode == 1, done.stderr
    rows = {Path(row["file"]).name: row for row in json.loads(counts.read_text())}
    assert set(rows) == {"test_outcomes.py", "test_crash.py", "test_slow.py"}
    assert rows["test_outcomes.py"] == {
        "file": "test_base_ops/test_outcomes.py", "tests": 5, "passed": 1, "failed": 2, "skipped": 1, "errors": 1,
        "reason": "AssertionError: 1 != 2",
    }  # fmt: skip
    assert rows["test_crash.py"]["passed"] == rows["test_crash.py"]["errors"] == 1
    assert rows["test_crash.py"]["reason"].startswith("the process ended with 3")
    assert (rows["test_slow.py"]["passed"], rows["test_slow.py"]["reason"]) == (1, "not done after 45 s")
    lines = done.stdout.splitlines()
    assert lines[-1].split()[:6] == ["all", "9", "3", "2", "1", "3"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere has no folder test"),
        (["plugin", "softmax"], "no test file below"),
        (["plugin", "--before", "nowhere.json"], "nowhere.json is not a file"),
    ],
)
def test_what_cannot_be_run_is_said(arguments: list[str], words: str, tmp_path: Path) -> None:
    checkout(tmp_path / "plugin", other="")
    done = run(tmp_path / arguments[0], *arguments[1:])
    assert done.returncode == 2 and words in done.stderr
