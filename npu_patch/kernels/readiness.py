"""Whether Triton kernels can run here: on an Ascend NPU, on the simulated one, on a GPU."""

from __future__ import annotations

import importlib
import importlib.util

import torch

from npu_patch.devices import is_simulated

ASCEND_BACKEND = "triton.backends.ascend"


def why_not() -> str | None:
    """What keeps the kernels from running on this machine, or None. Imports triton."""
    if is_simulated():
        reason = importlib.import_module("npu_patch.simulator.triton_kernels").prepare()
        return reason or _why_no_ascend()
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken installation raises more than ImportError
        return f"triton cannot be imported: {type(error).__name__}: {error}"
    return _why_no_ascend() if hasattr(torch, "npu") and torch.npu.is_available() else None


def _why_no_ascend() -> str | None:
    """The triton that torch brings along has no driver for an NPU, and its language takes powers of two only."""
    try:
        found = importlib.util.find_spec(ASCEND_BACKEND)
    except ModuleNotFoundError:  # a triton without any backends
        found = None
    return None if found else "this triton has no Ascend backend: triton-ascend is not installed, or was overwritten"
