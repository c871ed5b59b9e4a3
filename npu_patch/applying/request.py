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

    def of(self, name: str) -> tuple[bool | str, str]:
        """A switch for optional implementations, and where it comes from."""
        return self.switches[name], self.switches.sources[name]
