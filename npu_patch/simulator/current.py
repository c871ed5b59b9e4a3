"""What the kernel that this thread runs is part of: nothing, a capture, or a replay (graphs.py)."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Capture(Protocol):
    def refuse(self, name: str, why: str) -> None:
        """Raise `Refused`, and end the capture."""


class Current(threading.local):
    capture: Capture | None = None
    """What records the kernel."""
    made: "list[Tensor] | None" = None
    """Of a kernel that is captured: the tensors that it allocates."""
    places: "Iterator[Tensor] | None" = None
    """Of a kernel that a replay runs: the tensors that it allocated when it was captured."""


current = Current()
