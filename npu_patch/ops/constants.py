"""Vectors that operators want on the device where a number or nothing would do: made once for each device, and not to
be written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_MADE: dict[tuple[Any, ...], Tensor] = {}


def filled(value: float, width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[width]`, all of them `value`."""
    return _kept((value, width, device, dtype), lambda: torch.full((width,), value, dtype=dtype, device=device))


def numbered(width: int, device: torch.device) -> Tensor:
    """`[width]` of int32, from 0 on."""
    return _kept((width, device), lambda: torch.arange(width, dtype=torch.int32, device=device))


def _kept(key: tuple[Any, ...], make: Callable[[], Tensor]) -> Tensor:
    found = _MADE.get(key)
    if found is not None:
        return found
    with torch.inference_mode(False):  # a backward may save it
        made = make()
    if type(made) is Tensor and not _is_capturing(made.device):
        _MADE[key] = made
    return made


def _is_capturing(device: torch.device) -> bool:
    """What a capture makes is written when its graph is replayed, to memory of that graph."""
    if device.type == "cpu":
        return False
    capturing: bool = torch.get_device_module(device.type).is_current_stream_capturing()
    return capturing
