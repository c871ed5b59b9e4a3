"""python -m npu_patch run: the script is started as `python` starts it, and keeps its output and its exit code."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from npu_patch.commands import main
from npu_patch.commands.console.arguments import add_arguments
from npu_patch.switches import SWITCHES, set_for_children, unasked
from tests.support.installed import installed


def run(*arguments: str, folder: Path, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    told = {**installed(folder / "installed"), **environment}
    return subprocess.run(
        [sys.executable, "-m", "npu_patch", "run", *arguments], cwd=folder, env=told, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "code", "output", "error"),
    [
        ("print('done')", 0, "done\n", ""),
        ("import atexit; atexit.register(print, 'late')", 0, "late\n", ""),
        ("import sys; sys.exit(7)", 7, "", ""),
        ("import sys; sys.exit('no data')", 1, "", "no data\n"),
        ("import sys\nsys.excepthook = lambda *error: print('mine', error[0].__name__)\n1 / 0", 1,
         "mine ZeroDivisionError\n", ""),
    ],
    ids=["ends", "prints when it ends", "has a code", "gives a reason", "has a hook of its own"],
)  # fmt: skip
def test_output_and_exit_code_are_the_scripts_own(
    script: str, code: int, output: str, error: str, tmp_path: Path
) -> None:
    done = run("script.py", folder=tmp_path, script=script)
    assert (done.returncode, done.stdout, done.stderr) == (code, output, error)


def test_an_error_in_the_script_shows_its_traceback(tmp_path: Path) -> None:
    done = run("script.py", folder=tmp_path, script="def fails():\n    raise LookupError('mine')\nfails()")
    assert done.returncode == 1 and "in fails" in done.stderr
    assert done.stderr.endswith("LookupError: mine\n") and "npu_patch run:" not in done.stderr


def test_an_interrupted_script_shows_where_it_was(tmp_path: Path) -> None:
    # A shell starts what runs in its background with interrupts ignored.
    script = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    script += "def waits():\n    os.kill(os.getpid(), signal.SIGINT)\n    while True: pass\nwaits()"
    done = run("script.py", folder=tmp_path, script=script)
    assert done.returncode == 130 and "in waits" in done.stderr and done.stderr.endswith("KeyboardInterrupt\n")


@pytest.mark.parametrize("arguments", [("script.py",), ("-m", "script")])
def test_the_script_finds_its_arguments_and_its_folder(arguments: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text("here = True")
    script = "import sys, beside; print(__name__, sys.argv[1:], 'torch' in sys.modules)"
    done = run("--no-rope", *arguments, "--report", "-m", folder=tmp_path, script=script)
    assert done.stdout == "__main__ ['--report', '-m'] False\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "no such script: absent.py"),
        (["ls"], "is no Python script"),
        (["--report", "/nowhere/r.json", "-m", "this"], "--report /nowhere/r.json: there is no folder /nowhere"),
    ],
)
def test_what_cannot_be_started_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and not printed.out


@pytest.mark.parametrize(
    ("environ", "values", "report", "expected"),
    [
        ({}, {}, None, {"AUTO": "1"}),
        ({"TWINKLE_NPU_AUTO": "report"}, {}, None, {"AUTO": "report"}),
        ({"TWINKLE_NPU_AUTO": "0"}, {"rope": False, "triton": True}, None, {"AUTO": "1", "ROPE": "0", "TRITON": "1"}),
        ({"TWINKLE_NPU_REPORT": "/old"}, {}, "-", {"AUTO": "report"}),
        ({"TWINKLE_NPU_AUTO": "report"}, {}, "/r.json", {"AUTO": "1", "REPORT": "/r.json"}),
        ({"TWINKLE_NPU_GMM_PATCH": "1"}, {"moe_patch": False}, None,
         {"AUTO": "1", "MOE_PATCH": "0", "GMM_PATCH": "0"}),
        ({}, {"triton_cache": "/times"}, None, {"AUTO": "1", "TRITON_CACHE": "/times"}),
    ],
)  # fmt: skip
def test_children_inherit_what_was_asked_for(
    environ: dict[str, str], values: dict[str, object], report: str | None, expected: dict[str, str]
) -> None:
    set_for_children(values, report, environ)
    assert environ == {f"TWINKLE_NPU_{name}": value for name, value in expected.items()}
    wanted = unasked(environ)
    assert wanted.wanted and wanted.file == expected.get("REPORT")
    assert wanted.printed == (expected["AUTO"] == "report" and "REPORT" not in expected)


def test_every_switch_is_an_option() -> None:
    parser = argparse.ArgumentParser()
    add_arguments("run", parser)
    given = vars(parser.parse_args(["script.py"]))
    assert all(given[switch.name] is None for switch in SWITCHES)


@pytest.mark.parametrize(
    ("declared", "environment"), [(False, {}), (True, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"})], ids=["entry", "torch"]
)
def test_run_needs_no_entry_point_and_says_what_its_children_miss(
    declared: bool, environment: dict[str, str], tmp_path: Path
) -> None:
    told = {**installed(tmp_path / "installed", declared=declared), **environment}
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:], [type(each).__name__ for each in sys.meta_path][:1])")
    done = subprocess.run(
        [sys.executable, "-m", "npu_patch", "run", str(script), "--json"],
        env=told, capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout == "['--json'] ['LateImports']\n"
    assert done.stderr.startswith("npu_patch run: processes that it starts are not patched: ")
    assert done.stderr.count("\n") == 1
