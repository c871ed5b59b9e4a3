"""python -m npu_patch, whatever the command: what it refuses, and what reaches stdout, stderr and the exit code."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from npu_patch.commands import COMMANDS, main
from npu_patch.commands.console.output_file import output_file, why_no_file_can_be_made
from npu_patch.commands.console.result import CommandError, Result
from npu_patch.commands.console.terminal import drawn, steps, table
from npu_patch.commands.coverage import command as coverage

Captured = pytest.CaptureFixture[str]
# Where the answer comes from a stand-in, the real machinery around it in a process of its own costs no import of torch.
STAND_IN = """
import ctypes, os, sys, types
from npu_patch.commands.console.result import Result
stand_in = types.ModuleType("npu_patch.commands.coverage.command")
sys.modules[stand_in.__name__] = stand_in
{run}
stand_in.run = run
sys.argv = ["npu_patch", "coverage", "x", *sys.argv[1:]]
import runpy
runpy.run_module("npu_patch", run_name="__main__")
"""
CHATTY = """
def run(options):
    print("python")
    os.system("echo process")
    os.write(1, b"descriptor\\n")
    ctypes.CDLL(None).puts(b"c")
    return Result({"gain": float("inf")}, lambda: [], fine=False)
"""
LONG = "def run(options): return Result({}, lambda: ['line'] * 20000, fine=False)"


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[argparse.Namespace], Result]], None]:
    return lambda run: monkeypatch.setattr(coverage, "run", run)


def raising(error: BaseException) -> Callable[[argparse.Namespace], Result]:
    def run(options: argparse.Namespace) -> Result:
        raise error

    return run


def process(run: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", STAND_IN.format(run=run), *arguments]
    return subprocess.run(program, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.parametrize("command", ["verify", "tune", "coverage", "bench"])
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("TWINKLE_NPU_ROPE", "maybe", "TWINKLE_NPU_ROPE='maybe': accepted are 1/true/on/yes"),
        ("TWINKLE_NPU_TUNE", "/nosuch.json", "TWINKLE_NPU_TUNE='/nosuch.json'"),
    ],
)
def test_a_bad_environment_is_refused_before_any_work(
    command: str, variable: str, value: str, message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert main([command, "qwen3", *(["--output", "x.json"] if command == "tune" else [])]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and not printed.out
    assert printed.err.startswith(f"npu_patch {command}: {message}")


def test_an_unforeseen_error_is_one_line_and_with_debug_a_traceback(
    answering: Callable[..., None], capsys: Captured
) -> None:
    answering(raising(RuntimeError("the first line\nthe second")))
    assert main(["coverage", "qwen3"]) == 2
    assert capsys.readouterr().err == "npu_patch coverage: RuntimeError: the first line (--debug shows where)\n"
    assert main(["coverage", "qwen3", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_an_error_while_the_answer_is_drawn_is_one_too(answering: Callable[..., None], capsys: Captured) -> None:
    answering(lambda options: Result({}, lambda: (1 / 0 for _ in "x"), fine=True))
    assert main(["coverage", "qwen3"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["coverage", "qwen3"], ["coverage"], ["verify", "qwen3", "--device", "npu:x"]])
def test_with_json_an_error_is_json_too(arguments: list[str], answering: Callable[..., None], capsys: Captured) -> None:
    answering(raising(CommandError("it cannot")))
    try:
        code = main([*arguments, "--json"])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert list(json.loads(capsys.readouterr().out)) == ["error"]


def test_an_interruption_is_one_line(answering: Callable[..., None], capsys: Captured) -> None:
    answering(raising(KeyboardInterrupt()))
    assert main(["coverage", "qwen3"]) == 130
    assert capsys.readouterr().err == "npu_patch coverage: interrupted\n"


def test_json_has_null_where_a_number_is_none(answering: Callable[..., None], capsys: Captured) -> None:
    answering(lambda options: Result({"a": [math.inf, (math.nan, 1.0)], "b": True}, lambda: [], fine=True))
    assert main(["coverage", "qwen3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, [None, 1.0]], "b": True}


def test_json_is_alone_on_stdout_whatever_writes_to_its_descriptor() -> None:
    done = process(CHATTY, "--json", stdout=subprocess.PIPE)
    assert json.loads(done.stdout) == {"gain": None}
    assert sorted(done.stderr.split()) == ["c", "descriptor", "process", "python"]


def test_a_reader_that_leaves_is_no_error_and_changes_no_exit_code() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = process(LONG, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = process(CHATTY, "--json", stdout=full)
    assert done.returncode == 2
    assert "stdout: No space left on device" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_torch(command: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in sys.modules if each.startswith("npu_patch.commands.")]:
        if name.rpartition(".")[2] not in ("arguments", "result", "standard_output"):
            monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert ("--report" if command == "run" else "--json") in capsys.readouterr().out


def test_a_command_that_cannot_be_imported_names_the_doctor(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "npu_patch.commands.verify.command", None)
    assert main(["verify", "qwen3"]) == 2
    assert "python -m npu_patch doctor says what is wrong" in capsys.readouterr().err


def test_the_version_is_told(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("npu_patch ")


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("npu:x", "--device npu:x: accepted are npu, cuda, cpu"),
        ("npu:", "--device npu:: accepted are npu, cuda, cpu"),
        ("cpu:1", "--device cpu:1: there is 1 cpu"),
    ],
)
def test_a_device_that_is_none_is_refused(device: str, message: str, capsys: Captured) -> None:
    assert main(["verify", "qwen3", "--device", device]) == 2
    assert message in capsys.readouterr().err


def test_a_device_beyond_those_there_are_is_refused(npu: torch.device, capsys: Captured) -> None:
    assert main(["verify", "qwen3", "--device", "npu:99"]) == 2
    assert "--device npu:99: there " in capsys.readouterr().err


@pytest.mark.parametrize("option", [["tune", "--output"], ["bench", "--png"], ["coverage", "--html"]])
def test_a_file_that_cannot_be_written_is_refused_before_any_work(
    option: list[str], tmp_path: Path, capsys: Captured
) -> None:
    for path, message in {str(tmp_path): "that is a folder", "/proc/x.png": "it cannot be written ("}.items():
        assert main([option[0], "qwen3", option[1], path]) == 2
        assert f"{option[1]} {path}: {message}" in capsys.readouterr().err


def test_asking_whether_a_file_can_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    old, new = tmp_path / "old.png", tmp_path / "new.png"
    old.write_text("kept")
    assert (output_file("--png", old, ".png"), output_file("--png", new, ".png")) == (old, new)
    assert why_no_file_can_be_made(tmp_path / "a" / "b.json") is None
    assert old.read_text() == "kept" and list(tmp_path.iterdir()) == [old]
    with pytest.raises(CommandError, match=r"--png .*x\.txt: accepted is a name that ends in \.png"):
        output_file("--png", tmp_path / "x.txt", ".png")


def test_a_folder_named_like_a_model_type_does_not_hide_it(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qwen3").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["coverage", "qwen3", "--json"]) == 0
    capsys.readouterr()
    for model, message in {"./qwen3": "the folder has no config.json", "./nosuch": "there is no such folder"}.items():
        for command in ("coverage", "verify"):
            assert main([command, model]) == 2
            assert f"MODEL {model}: {message}" in capsys.readouterr().err


def test_a_batch_that_the_model_does_not_take_is_told_before_any_time(npu: torch.device, capsys: Captured) -> None:
    assert main(["bench", "gpt2", "--tiny", "--tokens", "4096"]) == 2
    assert "gpt2 does not run unpatched on 4096 tokens: IndexError" in capsys.readouterr().err


PARTS = ("x" * 150, table("Title", ("name", "n"), [("a", 1), (("red", "bb"), 22)], numbers=("n",)))


def test_lines_are_not_wrapped_and_tables_are_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(PARTS).splitlines()[0] == "x" * 150
    wide = table("", ("what",), [("word " * 40,)])
    for columns in (70, 150):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert columns - 10 < max(map(len, drawn([wide]).splitlines())) <= columns


def test_without_rich_tables_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert drawn(PARTS).splitlines() == ["x" * 150, "Title", "name   n", "----  -", "a      1", "bb    22"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with steps("working", quiet=False) as progress:
        progress.of(3)
        progress.done()
