"""Runs the kernels in triton's interpreter, on the CPU, tiled once as for CUDA and once as for an Ascend chip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

try:
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined: before any module of npu_patch.kernels is
    import triton  # noqa: F401
except ImportError as error:
    del os.environ["TRITON_INTERPRET"]
    WHY_NOT = f"triton cannot be imported: {error}"

    class Skipped(pytest.Module):
        def collect(self) -> list[pytest.Item]:
            pytest.skip(WHY_NOT, allow_module_level=True)

    def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module:
        """Every file here imports triton: each is reported as skipped, with the reason."""
        return Skipped.from_parent(parent, path=module_path)
else:
    from npu_patch.kernels import launch
    from npu_patch.kernels.interpreter import round_to_nearest

    round_to_nearest()


@pytest.fixture(params=["powers of two", "exact widths, many blocks"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> launch.Machine:
    """Few cores and, for the second, little room on chip, so that each program loops over several blocks.

    Powers of two are tiled as for CUDA, exact widths as for Ascend. `tests.kernels.exactness.ONE_MACHINE` spares a test
    of what no tiling decides the second run.
    """
    chosen = launch.Machine("cuda", 3) if request.param == "powers of two" else launch.Machine("npu", 2, 8192, True)
    monkeypatch.setattr(launch, "machine_of", lambda device: chosen)
    return chosen
