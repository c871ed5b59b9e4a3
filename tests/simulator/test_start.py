"""Starting the simulator: one-line errors, and scripts run by python -m npu_patch.simulator."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("simulated")

ROOT = str(Path(__file__).parents[2])
REAL = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in REAL}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**kept, "PYTHONPATH": ROOT, **environment},
        check=False,
    )


def refusal(code: str, **environment: str) -> str:
    """The message of the SimulatorError that `code` ends with."""
    done = python("-c", code, **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "SimulatorError: " in last, done.stderr
    return last


START = "from npu_patch import simulator; simulator.start()"


def test_importing_the_package_imports_no_torch() -> None:
    done = python("-c", "import sys; from npu_patch import simulator; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_torch_imported_too_early() -> None:
    message = refusal(f"import sys, types; sys.modules['torch'] = types.ModuleType('torch'); {START}")
    assert "torch is imported already" in message
    assert "before anything imports torch" in message


def test_a_real_cann_is_not_replaced() -> None:
    message = refusal(START, ASCEND_HOME_PATH="/usr/local/Ascend")
    assert "ASCEND_HOME_PATH=/usr/local/Ascend" in message
    assert "replace_real=True" in message


def test_missing_torch_npu() -> None:
    code = (
        "import importlib.metadata as m\ndef version(name): raise m.PackageNotFoundError(name)\nm.version = version\n"
    )
    assert "torch_npu is not installed" in refusal(code + START)


def test_untested_torch_npu() -> None:
    message = refusal("import importlib.metadata as m\nm.version = lambda name: '2.8.0'\n" + START)
    assert "torch_npu 2.8.0 is untested" in message
    assert "any_version=True" in message


def test_no_compiler(tmp_path: Path) -> None:
    message = refusal(START, CC="", PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "no C compiler" in message


def test_a_compiler_that_is_not_there(tmp_path: Path) -> None:
    message = refusal(START, CC="no-such-compiler", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "CC=no-such-compiler" in message
    assert not (tmp_path / "cache").exists()


def test_a_compiler_that_fails(tmp_path: Path) -> None:
    message = refusal(START, CC="false", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert "failed on cann_stub.c" in message
    assert not list((tmp_path / "cache" / "npu_patch" / "simulator").iterdir())


def test_too_many_devices() -> None:
    assert "devices=17" in refusal("from npu_patch import simulator; simulator.start(devices=17)")
    assert "LOCAL_WORLD_SIZE=17: the simulator has 1 to 16" in refusal(START, LOCAL_WORLD_SIZE="17")
    assert "LOCAL_WORLD_SIZE=two: the simulator has 1 to 16" in refusal(START, LOCAL_WORLD_SIZE="two")


def test_the_cache_is_made_once_and_reused(tmp_path: Path) -> None:
    first = python("-c", START, XDG_CACHE_HOME=str(tmp_path))
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "npu_patch" / "simulator").iterdir()
    made = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = python("-c", f"{START}; {START}", XDG_CACHE_HOME=str(tmp_path), CC="no-such-compiler")
    assert again.returncode == 0, again.stderr
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == made


def test_two_devices() -> None:
    code = (
        "from npu_patch import simulator; simulator.start(devices=2); import torch\n"
        "x = torch.ones(3, device='npu:1')\n"
        "assert torch.npu.device_count() == 2 and (x + 1).device.index == 1 and torch.npu.memory_allocated(1) > 0\n"
        "assert x.to('npu:0').device.index == 0\n"
        "try: x + x.to('npu:0')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "at least two devices, npu:1 and npu:0" in done.stdout


SCRIPT = """
import sys
import neighbour
import torch
print(sys.argv[1:], __name__, torch.ones(3, device="npu:0").sum().item(), neighbour.VALUE)
sys.exit(int(sys.argv[-1]))
"""


def test_the_runner_passes_arguments_and_the_exit_code(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("VALUE = 'beside'")
    done = python("-m", "npu_patch.simulator", str(tmp_path / "train.py"), "--lr", "3", "7")
    assert done.returncode == 7, done.stderr
    assert "['--lr', '3', '7'] __main__ 3.0 beside" in done.stdout


def test_the_runner_runs_a_module(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("VALUE = 'beside'")
    done = subprocess.run(
        [sys.executable, "-m", "npu_patch.simulator", "-m", "train", "0"],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ROOT}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "['0'] __main__ 3.0 beside" in done.stdout


@pytest.mark.parametrize(
    ("environment", "words"),
    [({}, "no such script"), ({"ASCEND_HOME_PATH": "/x"}, "ASCEND_HOME_PATH=/x")],
    ids=["no script", "real CANN"],
)
def test_the_runner_prints_one_line(environment: dict[str, str], words: str, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    if environment:
        script.write_text("raise SystemExit(0)")
    done = python("-m", "npu_patch.simulator", str(script), **environment)
    assert done.returncode == 2
    assert done.stderr.startswith("npu_patch.simulator: ")
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
