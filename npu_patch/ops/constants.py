"""Vectors of one number that operators want where the number would do: made once for each device."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def filled(value: float, width: int, device: torch.device) -> Tensor:
    """`[width]` of float32; not to be written to."""
    return _made(value, width, device) if _may_be_kept(device) else _made.__wrapped__(value, width, device)


@cache
def _made(value: float, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a backward may save it
        return torch.full((width,), value, dtype=torch.float32, device=device)


def _may_be_kept(device: torch.device) -> bool:
    """Not what a capture makes: it is written when the graph is replayed, and to memory of the graph."""
    if device.type == "cpu":
        return True
    capturing: bool = torch.get_device_module(device.type).is_current_stream_capturing()
    return not capturing
