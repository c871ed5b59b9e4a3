"""One op at one set of shapes, or a step: times, or counts on the simulated NPU."""

from __future__ import annotations

from dataclasses import dataclass

from npu_patch.measuring.in_turns import Timing


@dataclass(frozen=True)
class Measured:
    """One op at one set of shapes, or the step. Times in ms (None on the simulated NPU), counts there only. `failure`:
    why there are neither."""

    patch: str
    site: str
    shapes: str
    patched: Timing | None = None
    original: Timing | None = None
    launches: tuple[int, int] | None = None  # patched, original
    bytes: tuple[int, int] | None = None
    failure: str | None = None

    @property
    def times(self) -> tuple[Timing, Timing]:
        """Patched, original."""
        if self.patched is None or self.original is None:
            raise ValueError(f"{self.patch} {self.site}: {self.failure or 'no times, but counts'}")
        return self.patched, self.original

    @property
    def gain(self) -> float | None:
        """How many times faster, or with how many times fewer launches, it is patched."""
        if self.patched is not None and self.original is not None:
            return self.original.median / self.patched.median
        return None if self.launches is None or not self.launches[0] else self.launches[1] / self.launches[0]
