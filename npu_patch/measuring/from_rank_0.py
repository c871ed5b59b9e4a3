"""One rank measures for its job: the others take what the first one found, and measure only what it did not have; and
they follow its tuning file.

Ranks that measured for themselves could each find something else, and serve the parts of one step in several ways.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

WAIT_S = 60.0  # for a first rank that measures; one that does not apply anything is not waited for any longer


@dataclass
class Job:
    """`store`: torch.distributed's. Each `apply(model)` of a rank is a turn, as it is on the others."""

    store: Any
    rank: int
    turns: Counter[str] = field(default_factory=Counter)

    def next_turn(self, what: str) -> str:
        self.turns[what] += 1
        return f"npu_patch/{what}/{self.turns[what]}"

    def give(self, turn: str, content: Any) -> None:
        """By rank 0; None where it had nothing to decide."""
        with contextlib.suppress(RuntimeError):  # a store that keeps nothing: torch's fake one
            self.store.set(turn, json.dumps(content))

    def take(self, turn: str) -> tuple[Any, str | None]:
        """By every other rank: what rank 0 gave, or why nothing was to be had."""
        try:
            self.store.wait([turn], timedelta(seconds=WAIT_S))
        except (RuntimeError, dist.DistStoreError):
            return None, f"rank 0 did not say within {WAIT_S:g} s what it {turn.split('/')[1]}"
        return json.loads(self.store.get(turn)), None


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
