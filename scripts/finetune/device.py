"""The device of the job. `start()` comes before anything imports torch, because the simulated NPU has to."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npu_patch import simulator

from .settings import Unacceptable

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True)
class Device:
    """`type` as torch names it: "npu", "cuda" or "cpu"."""

    type: str
    simulated: bool

    def __str__(self) -> str:
        return f"{self.type} (simulated)" if self.simulated else self.type

    @property
    def module(self) -> ModuleType | None:
        """torch.npu or torch.cuda; None for the CPU."""
        import torch

        return None if self.type == "cpu" else getattr(torch, self.type)

    def trainer_arguments(self) -> dict[str, Any]:
        return {"use_cpu": True} if self.type == "cpu" else {}


def start(choice: str) -> Device:
    """`choice` is one of `settings.DEVICES`. Errors: `Unacceptable`."""
    if choice == "auto":
        choice = "simulated" if simulator.real_device() is None else "npu"
    if choice == "simulated":
        try:
            simulator.start()
        except simulator.SimulatorError as error:
            raise Unacceptable("--device", choice, str(error)) from None
        return Device("npu", simulated=True)
    if choice != "npu":
        _hide_torch_npu()
    try:
        _require(choice)
    except Exception as error:  # torch_npu on a broken CANN raises more than ImportError
        raise Unacceptable("--device", choice, f"no such device here ({error})") from None
    return Device(choice, simulated=False)


def _require(device_type: str) -> None:
    import torch

    if device_type == "npu":
        importlib.import_module("torch_npu")
    if device_type != "cpu" and not getattr(torch, device_type).is_available():
        raise RuntimeError(f"torch.{device_type}.is_available() is False")


def _hide_torch_npu() -> None:
    """On a machine without CANN, torch_npu is installed and cannot be imported."""
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
