"""What one `apply()` was asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from npu_patch.switches import Switches


@dataclass(frozen=True)
class Request:
    """`model`: None for every modeling file that is imported now or later."""

    model: torch.nn.Module | None
    device_type: str
    switches: Switches
    strict: bool = False

    @property
    def triton(self) -> tuple[bool | str, str]:
        """The switch for Triton kernels, and where it comes from."""
        return self.switches["triton"], self.switches.sources["triton"]
