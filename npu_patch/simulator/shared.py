"""What an npu operator and the CPU operator that computes it share: the arguments, over the same memory."""

from typing import Any

import torch
from torch import Tensor

from . import counters, memory
from .current import current
from .errors import Refused
from .memory import CPU


class Shared:
    """One call's npu tensors, their aliases, the device they are on, and the generator."""

    __slots__ = ("device", "generator", "name", "pairs")

    def __init__(self, name: str) -> None:
        self.name = name
        self.device: int | None = None
        self.generator: torch.Generator | None = None
        self.pairs: list[tuple[int, Tensor]] = []  # storage address, npu tensor

    def take(self, value: Any, cpu_allowed: bool = False) -> Any:
        """The argument as the CPU operator takes it. A CPU tensor must be `cpu_allowed`, or a number: without
        dimensions."""
        if isinstance(value, Tensor):
            if value.device.type != "npu":
                if not value.is_cpu or (value.dim() and not cpu_allowed):
                    self.refuse(value)
                if value.dim() and current.capture is not None:
                    current.capture.refuse(self.name, "a copy from the host, of a tensor that was given on the CPU,")
                return value
            self.require_strided(value)
            self.note_device(value)
            self.pairs.append((value.untyped_storage().data_ptr(), value))
            return memory.alias(value)
        if isinstance(value, list | tuple):
            if value and not isinstance(value[0], int | float):
                return [self.take(item, cpu_allowed) for item in value]
            return value
        if isinstance(value, torch.device):
            return CPU if value.type == "npu" else value
        if isinstance(value, torch.Generator):
            if value.device.type == "npu":
                self.generator = value
            return None
        return value

    def give(self, value: Any) -> Any:
        """A result as an npu tensor: a view of an argument where the CPU returned one, else a copy."""
        if isinstance(value, Tensor):
            if not value.is_cpu:
                return value
            self.require_strided(value)
            if self.pairs:
                address = value.untyped_storage().data_ptr()
                for other, tensor in self.pairs:
                    if address and address == other:
                        return memory.view_of(tensor, value)
            made = memory.to_device(value, memory.or_current(self.device))
            if counters.is_counting():
                counters.became(value, made)
            return made
        if isinstance(value, list | tuple):
            return [self.give(item) for item in value]
        return value

    def note_device(self, value: Tensor | list[Tensor]) -> None:
        """Check what is on a device or is written to: nothing is written to another device."""
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if tensor.device.type != "npu":
                self.refuse(tensor)
            if self.device is None:
                self.device = tensor.device.index
            elif tensor.device.index != self.device:
                raise RuntimeError(
                    "Expected all tensors to be on the same device, but found at least two devices, "
                    f"npu:{self.device} and {tensor.device}! (in {self.name})"
                )

    def require_strided(self, value: Tensor) -> None:
        if value.layout is not torch.strided:
            raise Refused(f"{self.name}: the simulated NPU does not have {value.layout} tensors")

    def refuse(self, value: Tensor) -> None:
        kind = value.device.type
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, npu and {kind}! "
            f"(a {kind.upper()} tensor of shape {list(value.shape)} was given to {self.name})"
        )
