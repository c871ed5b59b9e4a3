"""The device of the job. `start()` comes before anything imports torch, because the simulated NPU has to."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass

from npu_patch import simulator

from .settings import Unacceptable


@dataclass(frozen=True)
class Device:
    """An NPU."""

    simulated: bool

    def __str__(self) -> str:
        return "a simulated NPU" if self.simulated else "an NPU"


def start(choice: str) -> Device:
    """`choice` is one of `settings.DEVICES`. Errors: `Unacceptable`."""
    if choice == "auto":
        choice = "simulated" if simulator.real_device() is None else "npu"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate prefers a GPU to an NPU
    try:
        if choice == "simulated":
            simulator.start()
        else:
            _require_npu()
    except Exception as error:  # torch_npu on a broken CANN raises more than ImportError
        raise Unacceptable("--device", choice, f"no such device here: {error}") from None
    return Device(simulated=choice == "simulated")


def _require_npu() -> None:
    import torch

    importlib.import_module("torch_npu")
    if not torch.npu.is_available():
        raise RuntimeError("torch.npu.is_available() is False")
