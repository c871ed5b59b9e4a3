"""Whether the ranks of a job are patched alike, asked for by `require_same_on_all_ranks()`.

Each rank puts what it has in place into the job's store and reads what the others put there, so nobody waits for one
that does not ask for longer than the timeout.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from npu_patch.applying.api import report
from npu_patch.applying.state import PatchError
from npu_patch.version import __version__

NOT_IN_PLACE = "not in place"
State = Mapping[str, Mapping[str, str]]
"""Of a rank: each patch that is in place, with its sites and what serves them; the version and the tuning file."""
_asked: Counter[str] = Counter()


def require_same_on_all_ranks(timeout: float = 60.0) -> None:
    """To be called by every rank of torch.distributed, as often. A model may be in parts: sites that only some ranks
    have are not compared, patches are.

    Raises:
        PatchError: on every rank that asks, naming the ranks that differ, or that did not ask within `timeout` seconds.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    require_same("all", range(dist.get_world_size()), in_place(), timeout)


def require_same(who: str, ranks: Sequence[int], state: State, timeout: float) -> None:
    """The same for some of the ranks, this one among them; `state`: its own. Those of one `who` ask as often."""
    store, me = dist.distributed_c10d._get_default_store(), dist.get_rank()
    asked_by = f"{who}/{'-'.join(map(str, ranks))}"
    _asked[asked_by] += 1
    question = f"{asked_by}/{_asked[asked_by]}"
    problem = why_not_same(store, me, ranks, state, timeout, question)
    if problem is not None:
        raise PatchError(problem)


def in_place() -> State:
    standing = report()
    state: dict[str, dict[str, str]] = {
        "version": {"npu_patch": __version__},
        "tuning": {"file": "none" if standing.tuning is None else standing.tuning.digest},
    }
    for outcome in standing:
        if outcome.is_in_place:
            state.setdefault(outcome.patch, {})[outcome.site] = f"{outcome.variant} by {outcome.implementation}"
    return state


def why_not_same(store: Any, rank: int, ranks: Sequence[int], mine: State, timeout: float, question: str) -> str | None:
    key: Callable[[int], str] = lambda other: f"npu_patch/{question}/{other}"  # noqa: E731
    store.set(key(rank), json.dumps(mine))
    states: dict[int, State | None] = {}
    until = time.monotonic() + timeout
    for other in ranks:
        try:
            store.wait([key(other)], timedelta(seconds=max(until - time.monotonic(), 0.1)))
        except (RuntimeError, dist.DistStoreError):
            states[other] = None
        else:
            states[other] = json.loads(store.get(key(other)))
    silent = [other for other, state in states.items() if state is None]
    if silent:
        return f"{_ranks(silent)} did not ask whether all are patched alike within {timeout:g} s: is it patched?"
    return differences({other: state for other, state in states.items() if state is not None})


def differences(states: Mapping[int, State]) -> str | None:
    """In words, which ranks have what, where not all have the same."""
    lines = []
    for patch in sorted({patch for state in states.values() for patch in state}):
        having = {rank: state.get(patch) for rank, state in states.items()}
        if None in having.values():
            said = {rank: NOT_IN_PLACE if each is None else "in place" for rank, each in having.items()}
            lines.append(f"{patch}: {_by_value(said)}")
            continue
        sites = set.intersection(*(set(each or ()) for each in having.values()))
        for site in sorted(sites):
            values = {rank: (each or {})[site] for rank, each in having.items()}
            if len(set(values.values())) > 1:
                lines.append(f"{patch}, {site}: {_by_value(values)}")
    return None if not lines else "the ranks are not patched alike: " + "; ".join(lines)


def _by_value(values: Mapping[int, str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_ranks(having)}" for value, having in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
