"""What a simulated process starts has the simulated NPUs too, if and when it imports torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from npu_patch import simulator
from npu_patch.simulator import inherit

pytestmark = pytest.mark.usefixtures("simulated")

ROOT = str(Path(__file__).parents[2])
SUM = "import torch; print(torch.npu.device_count(), torch.ones(3, device='npu').sum().item())"


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=280, env={**os.environ, **environment},
        check=False,
    )  # fmt: skip


def simulated(*arguments: str, **environment: str) -> str:
    """What `python -m npu_patch.simulator ARGUMENTS` prints, started by a process that is not simulated."""
    plain = {"PYTHONPATH": ROOT, "NPU_PATCH_SIMULATOR_OPTIONS": "", **environment}
    done = python("-m", "npu_patch.simulator", *arguments, **plain)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def summed_by_two(index: int, path: str) -> None:
    torch.npu.set_device(index)
    torch.distributed.init_process_group("hccl", init_method=f"file://{path}/store", rank=index, world_size=2)
    total = torch.full((3,), index + 1.0, device="npu")
    torch.distributed.all_reduce(total)
    Path(f"{path}/{index}").write_text(f"{total.device} {total.sum().item()}")
    torch.distributed.destroy_process_group()


class OnNpu(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> float:
        return torch.full((3,), float(index), device="npu").sum().item()


def test_spawned_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many NPUs as the first process has, or as it says that there are ranks."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    torch.multiprocessing.spawn(summed_by_two, args=(str(tmp_path),), nprocs=2)
    assert [(tmp_path / str(index)).read_text() for index in range(2)] == ["npu:0 9.0", "npu:1 9.0"]


def test_data_loader_workers() -> None:
    batches = DataLoader(OnNpu(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    assert [batch.tolist() for batch in batches] == [[0, 3], [6, 9]]


def test_compile_workers() -> None:
    from torch._inductor.compile_worker.subproc_pool import SubprocPool

    pool = SubprocPool(1)
    try:
        assert pool.submit(simulator.is_active).result(timeout=200)
    finally:
        pool.shutdown()


SCRIPT = """
import os, sys, torch
from npu_patch import simulator
rank = int(os.environ["LOCAL_RANK"])
assert simulator.is_active()
torch.npu.set_device(rank)
torch.distributed.init_process_group("hccl")
total = torch.full((3,), rank + 1.0, device="npu")
torch.distributed.all_reduce(total)
with open(f"{sys.argv[1]}/rank{rank}", "w") as file:
    file.write(f"{torch.npu.device_count()} {total.device} {total.sum().item()}")
torch.distributed.destroy_process_group()
"""
TWO_RANKS = ["--standalone", "--nproc-per-node", "2"]
ACCELERATE = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
BESIDE = Path(sys.executable).parent


@pytest.mark.parametrize(
    ("launcher", "environment"),
    [
        (["-m", "npu_patch.simulator", "torchrun", *TWO_RANKS], {"NPU_PATCH_SIMULATOR_OPTIONS": ""}),
        (["-m", "npu_patch.simulator", "--devices", "2", "-m", "accelerate.commands.launch", *ACCELERATE],
         {"NPU_PATCH_SIMULATOR_OPTIONS": ""}),
        ([str(BESIDE / "torchrun"), *TWO_RANKS],
         {"NPU_PATCH_SIMULATOR_OPTIONS": "{}", "PYTHONPATH": os.pathsep.join([inherit.FOLDER, ROOT])}),
    ],
    ids=["torchrun", "accelerate launch", "torchrun by two variables"],
)  # fmt: skip
def test_ranks_of_launchers_communicate(launcher: list[str], environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    done = python(*launcher, str(tmp_path / "train.py"), str(tmp_path), **{"PYTHONPATH": ROOT, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(tmp_path / f"rank{rank}").read_text() for rank in range(2)] == ["2 npu:0 9.0", "2 npu:1 9.0"]


def test_a_program_that_is_no_script_is_not_run() -> None:
    done = python("-m", "npu_patch.simulator", "ls", PYTHONPATH=ROOT, NPU_PATCH_SIMULATOR_OPTIONS="")
    assert done.returncode == 2 and "ls is no Python script" in done.stderr


def test_workers_of_pytest_xdist(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "test_it.py").write_text(
        "def test_it():\n    import torch\n    assert torch.ones(3, device='npu').sum() == 3"
    )
    printed = simulated("-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", str(tmp_path))
    assert "1 passed" in printed


def test_options_reach_children_of_children() -> None:
    again = f"import subprocess, sys; print(subprocess.check_output([sys.executable, '-c', {SUM!r}], text=True))"
    options = '{"devices": 3, "any_version": false, "replace_real": false, "poison": true}'
    done = python("-c", again, NPU_PATCH_SIMULATOR_OPTIONS=options)
    assert done.stdout.split() == ["3", "3.0"], done.stderr
    assert "ASCEND_HOME_PATH" not in done.stdout


def test_a_script_that_starts_the_simulator_itself_has_its_own_options() -> None:
    code = "from npu_patch import simulator; simulator.start(devices=2); import torch; print(torch.npu.device_count())"
    done = python("-c", code)
    assert done.stdout.split() == ["2"], done.stderr


def test_a_child_may_ask_whether_there_is_a_torch_before_it_imports_it() -> None:
    """As trl and many others do."""
    done = python("-c", "import importlib.util; importlib.util.find_spec('torch'); " + SUM)
    assert done.stdout.split()[-1:] == ["3.0"], done.stderr


def test_python_that_never_imports_torch_reads_one_file_more() -> None:
    code = "import sys; print(sorted(set(sys.modules) & {'torch', 'torch_npu', 'npu_patch', 'json', 'dataclasses'}))"
    assert python("-c", code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "without",
    [
        "def version(name): raise m.PackageNotFoundError(name)\nm.version = version",
        "os.environ['TORCH_DEVICE_BACKEND_AUTOLOAD'] = '0'; sys.modules['torch_npu'] = None",
    ],
    ids=["not installed", "not loaded"],
)
def test_an_interpreter_without_torch_npu_has_no_npu(without: str, tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("PLAIN = True")
    code = f"import importlib.metadata as m, os, sys\n{without}\nsys.path.insert(0, {str(tmp_path)!r})"
    done = python("-c", f"{code}; import torch; print(torch.PLAIN)")
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("as_package", [False, True])
def test_a_sitecustomize_that_is_hidden_runs(as_package: bool, tmp_path: Path) -> None:
    hidden = tmp_path / ("sitecustomize/__init__.py" if as_package else "sitecustomize.py")
    hidden.parent.mkdir(exist_ok=True)
    hidden.write_text("import builtins; builtins.HIDDEN = __file__")
    path = os.pathsep.join([os.environ["PYTHONPATH"], str(tmp_path)])
    done = python("-c", "import sitecustomize; print(HIDDEN, sitecustomize.__file__)", PYTHONPATH=path)
    assert done.stdout.split() == [str(hidden)] * 2, done.stderr


def test_children_can_be_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(
        "import os, subprocess, sys\n"
        "code = 'import sys; print(any(type(f).__name__ == \"SimulateOnImport\" for f in sys.meta_path))'\n"
        "print(subprocess.check_output([sys.executable, '-c', code], text=True), os.environ['PYTHONPATH'])\n"
    )
    printed = simulated("--no-children", str(tmp_path / "train.py"), PYTHONPATH=ROOT)
    assert printed.split() == ["False", ROOT]
