"""Importing npu_patch imports nothing heavy, on any machine."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "torch_npu", "triton", "transformers", "peft", "accelerate", "mindspeed", "fla")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_imports_nothing_heavy() -> None:
    code = f"import sys, npu_patch, npu_patch.simulator; print([name for name in {HEAVY!r} if name in sys.modules])"
    assert run(code) == "[]"


def test_public_names_without_torch_npu_triton_or_a_modeling_file() -> None:
    """As on a machine that has only torch and transformers: the others cannot be imported."""
    code = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
for name in ("torch_npu", "triton", "peft", "accelerate", "mindspeed", "fla"):
    sys.modules[name] = None
import npu_patch
assert all(hasattr(npu_patch, name) for name in npu_patch.__all__)
assert not [name for name in sys.modules if ".modeling_" in name]
report = npu_patch.apply()
assert "torch_npu cannot be imported" in str(report), report
assert "nothing was rebound" in str(report), report
npu_patch.restore()
print("fine")
"""
    assert run(code) == "fine"


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert run("import npu_patch; print(hasattr(npu_patch, 'patch_all'), 'apply' in dir(npu_patch))") == "False True"
