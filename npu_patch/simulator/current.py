"""What the kernel that this thread runs is part of: nothing, a capture, or a replay (graphs.py)."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .graph_nodes import Graph


class Current(threading.local):
    capture: "Graph | None" = None
    """What records the kernel."""
    made: "list[Tensor] | None" = None
    """Of a kernel that is captured: the tensors that it allocates."""
    places: "Iterator[Tensor] | None" = None
    """Of a kernel that a replay runs: the tensors that it allocated when it was captured."""


current = Current()
