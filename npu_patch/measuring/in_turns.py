"""Times of several ways to do the same, taken in turns, so that what else the machine does falls on all alike: the one
clock of `auto`, `tune` and `bench`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from npu_patch.devices import synchronize
from npu_patch.serving.case import Measured

WARM_UPS = 3
SHORTEST = 2e-3  # seconds that one sample lasts: shorter ones are runs in a row, divided


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median of the samples and their quartiles. `peak`: bytes allocated at the most beyond what was
    there before; None where the device does not tell."""

    median: float
    low: float
    high: float
    peak: int | None

    def measured(self) -> Measured:
        return Measured(seconds=self.median / 1e3, quartiles=(self.low / 1e3, self.high / 1e3))


def in_turns(
    forms: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    samples: int,
    in_a_row: bool = True,
    peaks: bool = True,
    enough: float = math.inf,
) -> dict[str, Timing]:
    """Each form `samples` times, one after the other; fewer once they took `enough` seconds. `in_a_row`: short ones
    several times per sample. `peaks`: of memory too, which resets the device's own record of it."""
    taken_at_most = {name: _peak(form, device, peaks) for name, form in forms.items()}
    for form in forms.values():
        for _ in range(WARM_UPS - 1):
            form()
    runs = {name: _runs(form, device) if in_a_row else 1 for name, form in forms.items()}
    taken: dict[str, list[float]] = {name: [] for name in forms}
    until = time.perf_counter() + enough
    for turn in range(samples):
        if turn and time.perf_counter() > until:
            break
        for name, form in forms.items():
            taken[name].append(seconds(form, device, runs[name]) / runs[name] * 1e3)
    return {name: _timing(times, taken_at_most[name]) for name, times in taken.items()}


def _runs(form: Callable[[], object], device: torch.device) -> int:
    return max(1, min(100, int(SHORTEST / max(seconds(form, device, 1), 1e-6))))


def seconds(form: Callable[[], object], device: torch.device, runs: int) -> float:
    """Of several runs in a row: the host launches the next while the device is at one."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(runs):
        form()
    synchronize(device)
    return time.perf_counter() - started


def _timing(times: list[float], peak: int | None) -> Timing:
    if len(times) == 1:
        return Timing(times[0], times[0], times[0], peak)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, low, high, peak)


def _peak(form: Callable[[], object], device: torch.device, told: bool) -> int | None:
    if device.type == "cpu" or not told:
        form()
        return None
    backend = getattr(torch, device.type)
    form()  # whatever is made once
    synchronize(device)
    backend.reset_peak_memory_stats()
    before = backend.memory_allocated()
    form()
    synchronize(device)
    return int(backend.max_memory_allocated() - before)


def merged(timings: list[Timing]) -> Timing:
    """Of several turns: the medians of their numbers, the highest peak."""
    peaks = [timing.peak for timing in timings if timing.peak is not None]

    def middle(name: str) -> float:
        return float(statistics.median(getattr(timing, name) for timing in timings))

    return Timing(middle("median"), middle("low"), middle("high"), max(peaks) if peaks else None)
