"""The types of devices that patches serve: whether there is one, which one is current, and what it is called.

Imports torch only where it is asked something about a device: `doctor` runs where torch does not.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TYPES = ("npu", "cuda", "cpu")
ACCELERATORS = ("npu", "cuda")  # with Triton kernels


def why_none(device_type: str) -> str | None:
    """Why there is no such device here, or None."""
    if device_type == "cpu":
        return None
    if device_type == "npu":
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # a broken CANN raises more than ImportError
            return f"torch_npu cannot be imported: {error}"
    available = _backend(device_type).is_available()
    return None if available else f"torch.{device_type}.is_available() is False"


def is_simulated(device_type: str = "npu") -> bool:
    """Whether the NPU of this process is the simulated one. Imports nothing."""
    simulator = sys.modules.get("npu_patch.simulator")
    return device_type == "npu" and simulator is not None and simulator.is_active()


def described(device_type: str) -> str:
    """For people: "npu (simulated)"."""
    return f"{device_type} (simulated)" if is_simulated(device_type) else device_type


def current(device_type: str) -> torch.device:
    import torch

    if device_type == "cpu":
        return torch.device("cpu")
    return torch.device(device_type, _backend(device_type).current_device())


def chip(device: torch.device) -> str:
    """The chip's own name: "Ascend910B3"."""
    return "cpu" if device.type == "cpu" else str(_backend(device.type).get_device_name(device))


def synchronize(device: torch.device) -> None:
    """Waits for what was launched on the current device of this type."""
    if device.type != "cpu":
        _backend(device.type).synchronize()


def _backend(device_type: str) -> ModuleType:
    module: ModuleType = getattr(importlib.import_module("torch"), device_type)
    return module
