"""Kernel launches, bytes moved and host synchronisations, counted where the kernels are dispatched.

Rules:
- A launch is one dispatched kernel. Views, allocations and copies from or to the host are none. An operator that runs
  as one kernel on the NPU counts once, however much the CPU does to emulate it: fused operators, `_foreach_*` and fused
  optimizer steps are one launch each.
- Bytes are those of the inputs read plus those of the outputs written: elements times element size. A broadcast
  dimension (stride 0) counts once. A tensor changed in place is read and written, except by operators that only write
  (`copy_`, `fill_`, `zero_`, random fills and `out=` arguments).
- Where a fused operator's wrapper copies a non-contiguous input first, that copy is a launch of its own, named
  "contiguous(inside npu_x)".
- A host copy is whatever makes the host wait for the device: a device-to-host copy, `item()`, and operators whose
  output shape or result depends on data (`nonzero`, `masked_select`, `equal`, boolean indices...), 8 bytes each.
- Copies from host to device are `uploads`.
- A prefetch into the L2 cache computes nothing: those are `prefetches`, and their bytes apart.
- Capturing a graph counts nothing: nothing runs. A replay is one launch ("aclmdlRIExecuteAsync") and one of `replays`;
  the kernels that it runs are `replayed`, apart from the launches, and their bytes are the replay's.
- A collective is one call of HCCL, and its bytes are those that this rank sent to others. Those of an all-reduce are
  what a reduce-scatter and an all-gather send, 2 (n - 1) / n of the data.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import collectives
from .current import current

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Counted:
    """What was counted; complete once the `with` block has ended. Who wants to know more of each launch than this
    overrides `launched`, `waited`, `prefetched` and `became`, which are called one at a time, on the thread that
    launches."""

    launches: int = 0
    bytes: int = 0
    by_op: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Operator name, such as "aten::mm" or "npu::npu_rms_norm" -> (launches, bytes)."""
    host_copies: int = 0
    host_bytes: int = 0
    host_copies_by_op: dict[str, tuple[int, int]] = field(default_factory=dict)
    replays: int = 0
    replayed: int = 0
    replayed_by_op: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Operator name -> (kernels run by replays, bytes)."""
    uploads: int = 0
    upload_bytes: int = 0
    prefetches: int = 0
    prefetched_bytes: int = 0
    collectives: int = 0
    collective_bytes: int = 0
    collectives_by_call: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Function of HCCL, such as "HcclAllReduce" -> (calls, bytes that this rank sent to others)."""

    def launched(self, name: str, moved: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        self.launches += 1
        self.bytes += moved
        _add(self.by_op, name, moved)

    def replay_began(self) -> None:
        self.launches += 1
        self.replays += 1
        _add(self.by_op, REPLAY, 0)

    def ran_in_replay(self, name: str, moved: int, read: Sequence[Any], written: Sequence[Any]) -> None:
        self.replayed += 1
        self.bytes += moved
        _add(self.replayed_by_op, name, moved)
        replays, before = self.by_op.get(REPLAY, (0, 0))  # it may have begun before this block
        self.by_op[REPLAY] = replays, before + moved

    @property
    def kernels(self) -> int:
        """What the device ran, launched by the host or by a replay."""
        return self.launches - self.replays + self.replayed

    def waited(self, name: str, moved: int) -> None:
        self.host_copies += 1
        self.host_bytes += moved
        _add(self.host_copies_by_op, name, moved)

    def prefetched(self, address: int, moved: int, stream: int) -> None:
        self.prefetches += 1
        self.prefetched_bytes += moved

    def became(self, written: int, allocation: int) -> None:
        """What a kernel wrote at an address is, from here on, the device's allocation."""

    def __str__(self) -> str:
        lines, replayed = map(_rows, (self.by_op, self.replayed_by_op))
        sent = [f"{calls:>8} {moved:>14} {name}" for name, (calls, moved) in self.collectives_by_call.items()]
        return "\n".join(
            [
                f"{self.launches} launches, {self.bytes} bytes, {self.host_copies} host copies",
                *(["launches          bytes operator", *lines] if lines else []),
                *([f"{self.replayed} kernels of {self.replays} replays", *replayed] if self.replays else []),
                *([f"{self.prefetches} prefetches, {self.prefetched_bytes} bytes"] if self.prefetches else []),
                *([f"{self.collectives} collectives, {self.collective_bytes} bytes", *sent] if sent else []),
            ]
        )


REPLAY = "aclmdlRIExecuteAsync"

_lock = threading.Lock()  # backward runs on a thread of its own
_counting: tuple[Counted, ...] = ()


@contextmanager
def count(counted: Counted | None = None) -> Iterator[Counted]:
    """Count everything that any thread of this process does on the simulated NPUs within the block. Blocks may nest."""
    global _counting
    counted = Counted() if counted is None else counted
    with _lock:
        _counting = (*_counting, counted)
    before = collectives.totals()
    try:
        yield counted
    finally:
        with _lock:
            _counting = tuple(other for other in _counting if other is not counted)
        counted.collectives_by_call = collectives.since(before)
        counted.collectives = sum(calls for calls, _ in counted.collectives_by_call.values())
        counted.collective_bytes = sum(moved for _, moved in counted.collectives_by_call.values())


def is_counting() -> bool:
    return bool(_counting) or current.capture is not None


def launch(name: str, read: Iterable[Any], written: Iterable[Any]) -> None:
    """Record one kernel; `read` and `written` may hold anything, only tensors count."""
    if current.capture is not None:
        return
    read, written = list(read), list(written)
    moved = sum(map(tensor_bytes, read)) + sum(map(tensor_bytes, written))
    with _lock:
        for counted in _counting:
            (counted.launched if current.places is None else counted.ran_in_replay)(name, moved, read, written)


def replay() -> None:
    """Record the launch of a graph."""
    with _lock:
        for counted in _counting:
            counted.replay_began()


def became(written: "Tensor", tensor: "Tensor") -> None:
    """A formula's result, counted as written, has now its place in the device's memory."""
    pair = written.untyped_storage().data_ptr(), tensor.untyped_storage().data_ptr()
    with _lock:
        for counted in _counting:
            counted.became(*pair)


def host_copy(name: str, moved: int) -> None:
    """Record a wait for the device. A capture refuses it; a copy that a replay makes is not waited for."""
    if current.capture is not None:
        current.capture.refuse(name, "waiting for the device")
    if current.places is not None:
        return
    with _lock:
        for counted in _counting:
            counted.waited(name, moved)


def prefetch(address: int, moved: int, stream: int) -> None:
    with _lock:
        for counted in _counting:
            counted.prefetched(address, moved, stream)


def upload(moved: int) -> None:
    if current.capture is not None:
        return
    with _lock:
        for counted in _counting:
            counted.uploads += 1
            counted.upload_bytes += moved


def tensor_bytes(value: "Tensor | list[Tensor] | Any") -> int:
    """Bytes of a tensor, a list or tuple of them, or 0 for anything else."""
    if isinstance(value, list | tuple):
        return sum(map(tensor_bytes, value))
    if not hasattr(value, "element_size"):
        return 0
    elements = 1
    for size, stride in zip(value.size(), value.stride(), strict=True):
        if stride or not size:
            elements *= size
    return elements * value.element_size()


def _rows(table: dict[str, tuple[int, int]]) -> list[str]:
    rows = sorted(table.items(), key=lambda row: (-row[1][1], row[0]))
    return [f"{times:>8} {moved:>14} {name}" for name, (times, moved) in rows]


def _add(table: dict[str, tuple[int, int]], name: str, moved: int) -> None:
    times, total = table.get(name, (0, 0))
    table[name] = (times + 1, total + moved)
