"""An implementation of an op: which devices it serves, what the machine must have for it, and how it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op on tensors of the named device types.

    `missing()` says what the machine lacks for it, or None. `unsupported(...)` says why it cannot serve one call, or
    None; it looks at devices, dtypes and shapes only, and never at a value.
    """

    name: str
    device_types: tuple[str, ...]
    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    missing: Callable[[], str | None] = lambda: None


@dataclass(frozen=True)
class Choice:
    """The implementation that serves a device, and why each other one does not."""

    chosen: Implementation | None
    declined: dict[str, str]

    def why_none(self) -> str:
        return "no implementation: " + "; ".join(f"{name}: {reason}" for name, reason in self.declined.items())


def choose(implementations: Sequence[Implementation], device_type: str) -> Choice:
    """The first of `implementations` that serves `device_type` on this machine."""
    chosen: Implementation | None = None
    declined: dict[str, str] = {}
    for implementation in implementations:
        if device_type not in implementation.device_types:
            declined[implementation.name] = f"serves {', '.join(implementation.device_types)} only"
        elif (lacking := implementation.missing()) is not None:
            declined[implementation.name] = lacking
        elif chosen is not None:
            declined[implementation.name] = f"{chosen.name} comes first"
        else:
            chosen = implementation
    return Choice(chosen, declined)


def needs_operators(*names: str) -> Callable[[], str | None]:
    """A `missing` for implementations that call operators of torch_npu."""

    def missing() -> str | None:
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # a broken CANN raises more than ImportError
            return f"torch_npu cannot be imported: {error}"
        absent = [name for name in names if not hasattr(torch.ops.npu, name)]
        return f"this torch_npu has no {', '.join(absent)}" if absent else None

    return missing


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor of one device, not a subclass such as DTensor, which the operators do not take."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter
