"""What does not stay in the L2 of an Ascend 910B between two launches."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

BYTES = 192 << 20


@dataclass
class LevelTwo:
    """Of each allocation, how many bytes are in the cache; what was used longest ago leaves first. Written bytes are
    there at once, and go beyond when they leave."""

    size: int = BYTES
    _held: OrderedDict[int, tuple[int, bool]] = field(default_factory=OrderedDict)  # bytes, written
    _used: int = 0

    def touched(self, allocation: int, moved: int, written: bool) -> int:
        """Bytes that go beyond the cache as a kernel reads or writes `moved` of an allocation."""
        there, changed = self._held.pop(allocation, (0, False))
        self._used -= there
        beyond = 0 if written else max(0, moved - there)
        kept = max(there, moved)
        if kept > self.size:
            return max(beyond, moved)
        self._held[allocation] = kept, written or changed
        self._used += kept
        while self._used > self.size:
            _, (bytes_left, was_written) = self._held.popitem(last=False)
            self._used -= bytes_left
            beyond += bytes_left if was_written else 0
        return beyond

    def renamed(self, allocation: int, other: int) -> None:
        """What the cache holds of one allocation is of the other."""
        there, written = self._held.pop(allocation, (0, False))
        self._used -= self._held.pop(other, (0, False))[0]
        if there:
            self._held[other] = there, written
