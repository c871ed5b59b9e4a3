"""One rank measures for its job: the others take what the first one found, and measure only what it did not have.

Ranks that measured for themselves could each find something else, and serve the parts of one step in several ways.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from npu_patch.measuring.measurements import Measurements

WAIT_S = 60.0  # for a first rank that measures; one that does not apply anything is not waited for any longer


@dataclass
class Job:
    """`store`: torch.distributed's. Each `apply(model)` of a rank is a turn, as it is on the others."""

    store: Any
    rank: int
    turns: int = 0

    def next_turn(self) -> str:
        self.turns += 1
        return f"npu_patch/measured/{self.turns}"

    def give(self, turn: str, kept: Measurements | None) -> None:
        """By rank 0; None where it had nothing to decide."""
        self.store.set(turn, json.dumps(None if kept is None else kept.content()))

    def take(self, turn: str, kept: Measurements) -> str | None:
        """By every other rank. Returns why nothing was to be had, if so."""
        try:
            self.store.wait([turn], timedelta(seconds=WAIT_S))
        except (RuntimeError, dist.DistStoreError):
            return f"rank 0 did not say within {WAIT_S:g} s what it measured: this rank measured for itself"
        content = json.loads(self.store.get(turn))
        why_not = None if content is None else kept.take(content)
        return why_not and f"what rank 0 measured does not hold on this rank, which measured for itself: {why_not}"


_of_this_process: Job | None = None


def job() -> Job | None:
    """That this process is a rank of, or None."""
    global _of_this_process
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    store = dist.distributed_c10d._get_default_store()
    if _of_this_process is None or _of_this_process.store is not store:
        _of_this_process = Job(store, dist.get_rank())
    return _of_this_process
