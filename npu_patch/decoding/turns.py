"""Graphs of a device share memory, so one thread replays at a time, on one stream."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

OTHER_THREAD = "another thread generates on the device"
OTHER_STREAM = "generate() within generate(), on another stream"


@dataclass
class _Turn:
    thread: int
    stream: Any
    depth: int


_LOCK = threading.Lock()
_NOW: dict[str, _Turn] = {}
_LAST: dict[str, Any] = {}  # streams


@contextlib.contextmanager
def turn(device_type: str) -> Iterator[str | None]:
    """The reason why it is somebody else's, or None: then it is this thread's for the block."""
    stream, thread = torch.get_device_module(device_type).current_stream(), threading.get_ident()
    with _LOCK:
        now = _NOW.setdefault(device_type, _Turn(thread, stream, 0))
        reason = OTHER_THREAD if now.thread != thread else OTHER_STREAM if now.stream != stream else None
        if reason is None:
            now.depth += 1
    if reason is not None:
        yield reason
        return
    try:
        if _LAST.get(device_type, stream) != stream:
            stream.wait_stream(_LAST[device_type])
        yield None
    finally:
        with _LOCK:
            _LAST[device_type] = stream
            now.depth -= 1
            if now.depth == 0:
                del _NOW[device_type]
