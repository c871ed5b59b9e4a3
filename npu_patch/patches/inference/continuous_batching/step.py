"""What the host knows of the batch that runs: transformers' scheduler made it there, so nothing is read back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from npu_patch.serving.once_per_step import Ends

Value = TypeVar("Value")


@dataclass(frozen=True)
class Step:
    """`query_ends`: where each sequence ends among the queries, and `key_ends` among the keys, by the kind of layer.
    `lengths`: how many keys each row of a table of pages has, 1 for those that only pad. `made`: what the layers have
    made of it together, each thing once."""

    query_ends: Ends
    key_ends: Mapping[str, Ends]
    lengths: Ends
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Value]) -> Value:
        if key not in self.made:
            self.made[key] = make()
        value: Value = self.made[key]
        return value


class _Running(threading.local):
    step: Step | None = None


_RUNNING = _Running()


def running() -> Step | None:
    """That of this thread: generation has one of its own."""
    return _RUNNING.step


@contextmanager
def within(step: Step | None) -> Iterator[None]:
    before, _RUNNING.step = _RUNNING.step, step
    try:
        yield
    finally:
        _RUNNING.step = before


@contextmanager
def anew() -> Iterator[None]:
    """The same batch, and nothing made of it yet: what a graph is to compute at each replay is computed within it."""
    step = running()
    with within(None if step is None else Step(step.query_ends, step.key_ends, step.lengths)):
        yield


def step_of(runner: Any, batch: Mapping[str, Any]) -> Step:
    """Of transformers' ModelRunner, and the keywords that it calls the model with."""
    inputs = runner.inputs_and_outputs
    pairs = getattr(inputs, "io_pairs", None)
    inputs = inputs if pairs is None else pairs[inputs.current_pair].host_io
    queries = [each.query_length for each in inputs.requests_in_batch]
    lengths = [each.state.position_offset for each in inputs.requests_in_batch]  # past the new tokens already
    keys = {
        kind: tuple(
            accumulate(
                allocator.get_seqlen_k(length - query, query) for length, query in zip(lengths, queries, strict=True)
            )
        )
        for kind, allocator in runner.cache.cache_allocators.items()
    }
    table = batch.get("block_table")
    padding = 0 if table is None else table.shape[1] - len(lengths)
    return Step(tuple(accumulate(queries)), keys, (*lengths, *[1] * padding))
