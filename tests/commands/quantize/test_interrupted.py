"""Wherever it is interrupted, and however: the same command goes on, and the result is the same to the byte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from npu_patch.commands.quantize import progress as progress_module
from npu_patch.commands.quantize import shard as shard_module

from .checkpoints import files_in, quantised, stored

INTERRUPTED = 130


@contextmanager
def interrupted_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Ctrl-C instead of the write, move, removal or synchronisation of that number; how many there were."""
    calls = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                raise KeyboardInterrupt
            return function(*arguments, **named)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(shard_module, "_put", counted(shard_module._put))
        patched.setattr(progress_module, "write_atomically", counted(progress_module.write_atomically))
        patched.setattr(os, "fsync", counted(os.fsync))
        patched.setattr(os, "replace", counted(os.replace))
        patched.setattr(os, "unlink", counted(os.unlink))
        patched.setattr(os, "rmdir", counted(os.rmdir))
        yield calls


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("of_interruptions") / "model")


@pytest.fixture(scope="module")
def expected(model: Path) -> dict[str, bytes]:
    assert quantised(model, model.parent / "plain") == 0
    return files_in(model.parent / "plain")


def test_at_every_step(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "counted").mkdir()
    with interrupted_at(0, monkeypatch) as calls:
        assert quantised(model, tmp_path / "counted") == 0
    assert calls[0] > 50
    for number in range(1, calls[0] + 1):
        out = tmp_path / str(number)
        out.mkdir()
        with interrupted_at(number, monkeypatch):
            assert quantised(model, out) == INTERRUPTED
        assert quantised(model, out) == 0
        assert files_in(out) == expected, f"interrupted at step {number} of {calls[0]}"


def test_at_half_what_is_finished_is_kept(
    model: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with interrupted_at(0, monkeypatch) as calls:
        quantised(model, tmp_path / "counted")
    out = tmp_path / "out"
    with interrupted_at(calls[0] // 2, monkeypatch):
        assert quantised(model, out) == INTERRUPTED
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}
    assert 0 < len(finished) < 3
    capsys.readouterr()
    assert quantised(model, out, "--json") == 0
    assert json.loads(capsys.readouterr().out)["kept"] == sorted(finished)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert files_in(out) == expected


def interrupted_after_a_shard(model: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    number = 0
    while not list(out.glob("*.safetensors")):
        number += 1
        with interrupted_at(number, monkeypatch):
            assert quantised(model, out) == INTERRUPTED
    return next(out.glob("*.safetensors"))


def test_a_finished_shard_that_was_damaged_since_is_written_anew(
    model: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shard = interrupted_after_a_shard(model, tmp_path / "out", monkeypatch)
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert quantised(model, tmp_path / "out") == 0
    assert shard.name in capsys.readouterr().out.split("as they had changed:")[1]
    assert files_in(tmp_path / "out") == expected


def test_other_settings_or_another_model_do_not_go_on_from_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = stored(tmp_path / "model")
    interrupted_after_a_shard(own, tmp_path / "out", monkeypatch)
    before = files_in(tmp_path / "out")
    assert quantised(own, tmp_path / "out", "--format", "ascend") == 2
    assert "(layout, settings differ" in capsys.readouterr().err
    os.utime(own / "tokenizer.json", ns=(1, 1))
    assert quantised(own, tmp_path / "out") == 2
    assert "(files of the model differ" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == before


# Imports once; then a process for each call, which is killed at a random instant, and others that end by themselves.
KILLS = """
import os, random, signal, sys, time
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import npu_patch.commands.quantize.command
from npu_patch.commands import main

def started(out):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["quantize", sys.argv[1], out]))
    return child

def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

chance, killed = random.Random(7), 0
began = time.monotonic()
assert ended(started(sys.argv[2] + "-first")) == 0
duration = time.monotonic() - began
for number in range(int(sys.argv[3])):
    out, code, tries = sys.argv[2] + f"-{number}", None, 0
    while code != 0:
        child, tries = started(out), tries + 1
        if tries <= 1 + number % 3:
            time.sleep(chance.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        code = ended(child)
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
print(killed)
"""


def test_killed_at_random_instants(model: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", KILLS, str(model), str(tmp_path / "out"), "20"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 20
    for number in range(20):
        assert files_in(tmp_path / f"out-{number}") == expected


MEMORY = """
import os, resource, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
import torch
from npu_patch.commands import main
import npu_patch.commands.quantize.command
torch.ones(64, 64).round_().amax(-1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["quantize", *sys.argv[1:]]) == 0
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before), file=sys.stderr)
"""


def test_memory_is_less_than_a_shard(tmp_path: Path) -> None:
    shard = 2 * 4096 * 16384
    tensors = {f"layers.{i}.weight": torch.zeros(4096, 16384, dtype=torch.bfloat16) for i in range(2)}
    model = stored(tmp_path / "model", tensors, shards=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    command = [sys.executable, "-c", MEMORY, str(model), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < shard


def test_another_process_that_is_at_it_is_not_disturbed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with progress_module.Progress(out).begun({"another": 1}, "x"):
        before = files_in(out)
        assert quantised(model, out) == 2
        assert "another process is writing there" in capsys.readouterr().err and files_in(out) == before
