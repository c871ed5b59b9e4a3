"""What torch calls at the end of its import: silent where nobody asked, never an error, `apply()` at the right time.

In processes with stand-ins for transformers and for `apply()`, which need no torch.
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from npu_patch.autoload.entry import AUTOLOAD, GROUP, why_no_entry
from npu_patch.reporting.outcome import PATCHED, Outcome
from npu_patch.reporting.report import Report
from tests.support.installed import ROOT, installed

STAND_IN = """
import sys, types
from npu_patch.autoload import autoload
from npu_patch.reporting.outcome import PATCHED, Outcome
from npu_patch.reporting.report import Report
from npu_patch.sites.late_imports import is_half_executed

def state():
    found = {{name.rpartition(".")[2]: module for name, module in sys.modules.items() if "modeling_" in name}}
    return {{name: is_half_executed(module) for name, module in found.items()}}

def apply():
    print("applied", state())
    {inside}
    return REPORT

REPORT = Report("npu", [Outcome("rms_norm", "m.Norm.forward", PATCHED)])
api = types.ModuleType("npu_patch.applying.api")
api.apply, api.report = apply, lambda: REPORT
sys.modules["npu_patch.applying"] = types.ModuleType("npu_patch.applying")
sys.modules[api.__name__] = api
{script}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """transformers, as far as imports go. Who imports torch first calls `autoload`."""
    models = tmp_path / "transformers" / "models"
    for name in ("a", "b"):
        (models / name).mkdir(parents=True)
        (models / name / "__init__.py").touch()
        (models / name / f"modeling_{name}.py").write_text("import torch\nimport transformers.modeling_utils\n")
    (models / "__init__.py").touch()
    (models.parent / "__init__.py").touch()
    (models.parent / "modeling_utils.py").write_text("import torch\n")
    (tmp_path / "torch.py").write_text("from npu_patch.autoload import autoload\nautoload()\n")
    return tmp_path


def process(script: str, folder: Path, inside: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TWINKLE_NPU_")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "NPU_PATCH_SIMULATOR_OPTIONS": ""}
    code = STAND_IN.format(script=script, inside=inside)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment | variables, cwd=folder, capture_output=True, text=True,
        timeout=60, check=True,
    )  # fmt: skip


@pytest.mark.parametrize("variables", [{}, {"TWINKLE_NPU_AUTO": "0"}, {"TWINKLE_NPU_AUTO": ""}])
def test_nothing_happens_where_nobody_asked(variables: dict[str, str], folder: Path) -> None:
    script = "hooks = list(sys.meta_path)\nimport transformers.models.a.modeling_a\nprint(hooks == sys.meta_path)"
    done = process(script + "; print('npu_patch.autoload.door' in sys.modules)", folder, **variables)
    assert (done.stdout, done.stderr) == ("True\nFalse\n", "")


def test_where_it_is_not_set_nothing_more_is_imported() -> None:
    code = "import sys; from npu_patch.autoload import autoload; autoload(); print([*sys.modules])"
    kept = {name: value for name, value in os.environ.items() if name != "TWINKLE_NPU_AUTO"}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    modules = [name for name in ast.literal_eval(done.stdout) if name.startswith("npu_patch")]
    assert modules == ["npu_patch.version", "npu_patch", "npu_patch.autoload"]


@pytest.mark.parametrize(
    ("imports", "applied"),
    [
        (["torch", "transformers.modeling_utils"], "{'modeling_utils': False}"),
        (["torch", "transformers.models.a.modeling_a"], "{'modeling_a': False, 'modeling_utils': False}"),
        (["transformers.modeling_utils", "transformers.models.b.modeling_b"],
         "{'modeling_utils': False, 'modeling_b': False}"),
        # the file that imports torch first cannot be waited for: apply() comes back to what is half executed
        (["transformers.models.a.modeling_a"], "{'modeling_a': True, 'modeling_utils': False}"),
    ],
    ids=["what is awaited", "a modeling file before it", "torch comes within it", "torch comes within a modeling file"],
)  # fmt: skip
def test_apply_runs_once_when_transformers_is_complete(imports: list[str], applied: str, folder: Path) -> None:
    script = "\n".join(f"import {name}" for name in [*imports, "transformers.models.b.modeling_b"])
    script += "\nautoload()\nprint([type(each).__name__ for each in sys.meta_path])"
    done = process(script, folder, TWINKLE_NPU_AUTO="on")
    assert done.stdout.splitlines()[:-1] == [f"applied {applied}"] and not done.stderr
    assert "LateImports" not in done.stdout


@pytest.mark.parametrize(
    ("inside", "variables", "said"),
    [
        ("raise ValueError('TWINKLE_NPU_ROPE=2')", {"TWINKLE_NPU_AUTO": "1"},
         "TWINKLE_NPU_AUTO: nothing is patched: ValueError: TWINKLE_NPU_ROPE=2"),
        ("", {"TWINKLE_NPU_AUTO": "maybe"},
         "nothing is patched by itself: ValueError: TWINKLE_NPU_AUTO='maybe': accepted are report, 1/true/on/yes and "
         "0/false/off/no"),
        ("", {"TWINKLE_NPU_AUTO": "1", "TWINKLE_NPU_REPORT": "nowhere/report.json"},
         "TWINKLE_NPU_AUTO: the report could not be written: FileNotFoundError: "),
    ],
    ids=["apply() fails", "a wrong word", "no such folder"],
)  # fmt: skip
def test_what_goes_wrong_is_said_once_and_fails_no_import(
    inside: str, variables: dict[str, str], said: str, folder: Path
) -> None:
    script = "import torch, transformers.models.a.modeling_a, transformers.models.b.modeling_b; print('imported')"
    done = process(script, folder, inside, **variables)
    assert done.stdout.endswith("imported\n")
    said_once, _, report = done.stderr.partition("\n")
    assert said_once.startswith(said) and bool(report) == ("TWINKLE_NPU_REPORT" in variables)  # else it were lost


def test_a_broken_npu_patch_fails_no_import_of_torch(folder: Path) -> None:
    script = "sys.modules['npu_patch.autoload.door'] = None\nimport torch\nprint('imported')"
    done = process(script, folder, TWINKLE_NPU_AUTO="1")
    assert done.stdout == "imported\n" and done.stderr.startswith("nothing is patched by itself: ModuleNotFoundError: ")


USED = "REPORT.outcomes[0].calls.ran = 3"
RANK_1 = {"RANK": "1"}


@pytest.mark.parametrize(
    ("script", "variables", "printed"),
    [
        (USED, {}, ["npu_patch on npu: 1 sites: 1 patched, 0 skipped, 0 failed", "rms_norm          Norm"]),
        ("", {}, ["npu_patch on npu: 1 sites: 1 patched, 0 skipped, 0 failed; no layer was made in this process\n"]),
        (USED, RANK_1, []),
        ("import multiprocessing as m; m.process._parent_process = m.process.current_process()", {}, []),
        (USED + "; import os\nif os.fork() == 0: sys.exit()\nos.wait(); REPORT.device = 'x'", {}, ["npu_patch on x"]),
    ],
    ids=["used", "not used", "another rank", "a worker that did not use it", "a fork"],
)
def test_who_prints_the_report(script: str, variables: dict[str, str], printed: list[str], folder: Path) -> None:
    script = f"import torch, transformers.modeling_utils\n{script}"
    done = process(script, folder, TWINKLE_NPU_AUTO="report", **variables)
    assert all(words in done.stderr for words in printed)
    assert done.stderr.count("npu_patch on") == bool(printed)


@pytest.mark.parametrize(("used", "expected"), [(True, "mine"), (False, "theirs")])
def test_a_launcher_in_which_nothing_ran_leaves_the_report_of_its_ranks(
    used: bool, expected: str, folder: Path
) -> None:
    """Which they wrote while it waited for them."""
    ranks = "import pathlib; pathlib.Path('report.json').write_text('theirs'); REPORT.device = 'mine'"
    script = f"import torch, transformers.modeling_utils\n{ranks}\n{USED if used else ''}"
    (folder / "report.json").write_text("of an earlier job")
    process(script, folder, TWINKLE_NPU_AUTO="1", TWINKLE_NPU_REPORT="report.json")
    assert expected in (folder / "report.json").read_text()


@pytest.mark.parametrize(("name", "begins"), [("r.json", "{"), ("r.html", "<!doctype html>"), ("r.txt", "npu_patch")])
def test_a_report_is_written_in_the_form_of_its_ending(name: str, begins: str, tmp_path: Path) -> None:
    report = Report("npu", [Outcome("rms_norm", "m.Norm.forward", PATCHED)])
    report.write(tmp_path / name)
    assert (tmp_path / name).read_text().startswith(begins)


def test_the_entry_point_is_declared_and_loads(tmp_path: Path) -> None:
    installed(tmp_path)
    (entry,) = importlib.metadata.Distribution.discover(path=[str(tmp_path)]).__iter__().__next__().entry_points
    assert (entry.group, entry.name) == (GROUP, "npu_patch")
    assert entry.load()() is None


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((["torch_npu", "npu_patch"], (2, 13), {}), None),
        ((["torch_npu", "npu_patch"], None, {AUTOLOAD: "1"}), None),
        ((["npu_patch"], (2, 13), {AUTOLOAD: "0"}), f"{AUTOLOAD}='0' keeps torch from calling it"),
        ((["npu_patch"], (2, 13), {AUTOLOAD: "yes"}), f"{AUTOLOAD}='yes' keeps torch from calling it"),
        (
            (["torch_npu"], (2, 13), {}),
            "no installed distribution declares the entry point npu_patch of torch.backends",
        ),
        ((["npu_patch"], (2, 4, 1), {}), "torch 2.4.1 calls no entry points; 2.5 does"),
    ],
)
def test_what_closes_the_door(arguments: tuple[Any, ...], reason: str | None) -> None:
    found = why_no_entry(*arguments)
    assert found is None if reason is None else found is not None and found.startswith(reason)
