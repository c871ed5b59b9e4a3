"""With poison on, device memory that nobody wrote, or that was given back, is NaN in every float dtype that it has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.usefixtures("simulated")

ROOT = str(Path(__file__).parents[2])

FLOATS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e8m0fnu, torch.complex64,
]  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_pattern_is_nan(dtype: torch.dtype) -> None:
    pattern = torch.full((64,), 0xFF, dtype=torch.uint8).view(dtype)
    assert (pattern if dtype.is_complex else pattern.float()).isnan().all()


# Below torch.empty, which is poisoned always: `raw` is what torch_npu's C++ allocates results with.
SCRIPT = """
import ctypes, sys, torch
npu = torch.device("npu")

def raw(*size):
    return torch.ops.npu.empty_with_format(size, dtype=torch.float32, device=npu)

def grown():
    storage = torch.zeros(10, device=npu).untyped_storage()
    storage.resize_(40_000)
    return torch.empty(0, device=npu).set_(storage, 0, (10_000,), (1,))

def reused(size):
    written = raw(size).zero_()
    address = written.data_ptr()
    del written
    again = raw(size)
    assert again.data_ptr() == address
    return again

def after_free(size):
    freed = raw(size).zero_()
    address = freed.data_ptr()
    del freed
    return torch.tensor((ctypes.c_float * size).from_address(address)[:])

print({
    "fresh, small": raw(1000).isnan().all().item(),
    "fresh, large": raw(1 << 22).isnan().all().item(),
    "handed out again, small": reused(1001).isnan().all().item(),
    "handed out again, large": reused(1 << 22).isnan().all().item(),
    "freed": after_free(1002).isnan().all().item(),
    "storage that grew": grown()[10:].isnan().all().item(),
    "tensor that grew": torch.zeros(10, device=npu).resize_(9_000)[10:].isnan().all().item(),
    "kept": grown()[:10].tolist() == [0.0] * 10,
})
"""


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {**os.environ, "PYTHONPATH": ROOT, "NPU_PATCH_SIMULATOR_OPTIONS": ""}
    plain.pop("NPU_PATCH_SIMULATOR_POISON", None)
    return subprocess.run(
        [sys.executable, "-m", "npu_patch.simulator", *options], capture_output=True, text=True, timeout=280,
        env={**plain, **environment}, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("by_variable", [False, True], ids=["--poison", "variable"])
def test_fresh_freed_and_reused_memory(by_variable: bool, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT + "import os; print([os.environ.get(name) for name in ('LD_PRELOAD', 'ASCEND_HOME_PATH')])"
    )
    if by_variable:
        done = run(str(script), NPU_PATCH_SIMULATOR_POISON="1")
    else:
        done = run("--poison", str(script), LD_PRELOAD="")
    assert done.returncode == 0, done.stderr
    seen = eval(done.stdout.splitlines()[0])
    assert len(seen) == 8
    assert all(seen.values()), seen
    assert eval(done.stdout.splitlines()[1]) == [None if by_variable else "", None]


def test_without_poison_memory_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    seen = eval(run(str(tmp_path / "script.py")).stdout.splitlines()[0])
    assert not seen["handed out again, large"]
    assert seen["kept"]


def test_a_value_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "script.py").touch()
    done = run(str(tmp_path / "script.py"), NPU_PATCH_SIMULATOR_POISON="yes")
    assert done.returncode == 2
    assert done.stderr == (
        "npu_patch.simulator: NPU_PATCH_SIMULATOR_POISON='yes': it must be 1 (device memory nobody wrote is NaN) or 0\n"
    )
