"""Whether Triton kernels can run here: on an Ascend NPU, on the simulated one, on a GPU."""

from __future__ import annotations

import importlib
import sys


def why_not() -> str | None:
    """What keeps the kernels from running on this machine, or None. Imports triton."""
    if is_simulated():
        return importlib.import_module("npu_patch.simulator.triton_kernels").prepare()
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return None


def is_simulated() -> bool:
    """Whether the NPU of this process is the simulated one."""
    simulator = sys.modules.get("npu_patch.simulator")
    return simulator is not None and simulator.is_active()
