"""What one step costs, told by the simulated NPU's counters and the device's allocator."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

import torch
from transformers import TrainerCallback

from npu_patch import simulator

from .device import Device


@dataclass(frozen=True)
class Cost:
    """Of one step. `None`: only a simulated NPU counts it."""

    launches: float | None
    bytes: float | None
    host_copies: float | None
    peak_memory: int


@dataclass
class Meter(TrainerCallback):
    """Measures every step from its first forward pass to the end of its optimizer step."""

    device: Device
    _counted: list[Any] = field(default_factory=list)
    _peaks: list[int] = field(default_factory=list)
    _counting: ExitStack = field(default_factory=ExitStack)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.npu.reset_peak_memory_stats()
        if self.device.simulated:
            self._counted.append(self._counting.enter_context(simulator.count()))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._counting.close()
        self._peaks.append(torch.npu.max_memory_allocated())

    def cost(self) -> Cost:
        """The mean of all steps but the first, which also makes the optimizer's state; the highest peak of all."""
        usual = self._counted[1:] or self._counted
        return Cost(
            launches=mean(counted.launches for counted in usual) if usual else None,
            bytes=mean(counted.bytes for counted in usual) if usual else None,
            host_copies=mean(counted.host_copies for counted in usual) if usual else None,
            peak_memory=max(self._peaks),
        )
