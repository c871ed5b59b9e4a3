"""Which implementation serves each call at a site: the usual one, or a Triton kernel that was measured to be faster.

A site asks by a key, the sizes and dtypes that decide the time (the case's key, or anything hashable that stands for
it). What was never measured is served as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from npu_patch.measure import OUT_OF_MEMORY, Alternative, Case, Measured, Stopwatch, faster, measure, stopwatch
from npu_patch.measured_on import here
from npu_patch.measurements import Measurements, default_path
from npu_patch.ops.implementation import Choice, Implementation
from npu_patch.outcome import Calls
from npu_patch.sites import LiveModules

NO_MODEL = "no model was given: nothing was measured yet"
NO_LAYERS = "nothing was measured: the given model has no such layer"
Cases = Callable[[LiveModules], Iterable[tuple[Hashable, Case]]]


def no_cases(live: LiveModules) -> Iterable[tuple[Hashable, Case]]:
    return ()


@dataclass(frozen=True)
class Verdict:
    """Of one case: the optional implementation that is taken, or None, and what was measured of each one."""

    case: Case
    taken: Implementation | None
    usual: str
    measured: Mapping[str, Measured]

    def words(self, name: str) -> str:
        """What was measured of the optional implementation `name`, beside the usual one."""
        mine, other = self.measured[name], self.measured[self.usual]
        if mine.wrong is not None:
            return mine.wrong
        return f"{_milliseconds(mine)} against {_milliseconds(other)}"


@dataclass
class Selection:
    """Of one site. `cases(live)` yields what to measure for the layers of a model, each with the key of its calls;
    `verdicts` are the cases that were; `asked` whether a model was ever looked at."""

    choice: Choice
    cases: Cases = no_cases
    verdicts: Mapping[Hashable, Verdict] = field(default_factory=lambda: MappingProxyType({}))
    asked: bool = False

    def serving(self, key: Hashable, calls: Calls, *call: Any) -> Implementation | str:
        """The implementation for one call, asked with `unsupported(*call)`; or why none takes it."""
        preferred = self._preferred(key)
        usual = self.choice.chosen
        reason = "no implementation"
        for implementation in (*preferred, usual) if usual is not None else preferred:
            reason = implementation.unsupported(*call)
            if reason is None:
                if self.choice.candidates and not torch.compiler.is_compiling():
                    calls.ran_by[implementation.name] += 1
                return implementation
            if implementation is not usual and not torch.compiler.is_compiling():
                calls.declined[implementation.name] = reason
        return reason

    def _preferred(self, key: Hashable) -> tuple[Implementation, ...]:
        if not self.choice.candidates:
            return ()
        if self.choice.forced:
            return self.choice.candidates
        verdict = self.verdicts.get(key)
        return () if verdict is None or verdict.taken is None else (verdict.taken,)

    def unmeasured(self, live: LiveModules) -> dict[Hashable, Case]:
        """The cases of `live` that a decision still waits for, by key."""
        self.asked = True
        if self.choice.forced or not self.choice.candidates:
            return {}
        return {key: case for key, case in self.cases(live) if key not in self.verdicts}

    def name(self) -> str:
        """For the report: what serves the site."""
        usual = self.choice.chosen.name if self.choice.chosen is not None else "the original"
        if self.choice.forced and self.choice.candidates:
            return self.choice.candidates[0].name
        taken = [verdict for verdict in self.verdicts.values() if verdict.taken is not None]
        if not taken:
            return usual
        several = len(self.verdicts) > 1
        parts = [
            f"{each.taken.name} ({f'{each.case.name}: ' if several else ''}{each.words(each.taken.name)})"
            for each in taken
        ]
        return ", ".join(parts if len(taken) == len(self.verdicts) else [*parts, usual])

    def declined(self) -> dict[str, str]:
        """For the report: why each other implementation does not serve the site, or not all of its calls."""
        found = dict(self.choice.declined)
        if self.choice.forced or not self.choice.candidates:
            return found
        for candidate in self.choice.candidates:
            others = [each for each in self.verdicts.values() if each.taken is not candidate]
            if others:
                found[candidate.name] = "; ".join(f"{each.case.name}: {each.words(candidate.name)}" for each in others)
            elif not self.verdicts:
                found[candidate.name] = NO_LAYERS if self.asked else NO_MODEL
        return found


@dataclass
class Measurer:
    """Turns cases into verdicts: from what was kept, else by measuring on `device`."""

    device: torch.device
    kept: Measurements
    stopwatch: Stopwatch

    @classmethod
    def of(cls, device_type: str, path: str | None) -> Measurer:
        index = None if device_type == "cpu" else getattr(torch, device_type).current_device()
        device = torch.device(device_type, index)
        measured_on = here(device)
        kept = Measurements.read(Path(path) if path else default_path(measured_on), measured_on)
        return cls(device, kept, stopwatch(device))

    def judge(self, case: Case, choice: Choice) -> Verdict:
        usual = case.original if choice.chosen is None else Alternative(choice.chosen.name, choice.chosen.run)
        if usual is None:
            raise ValueError(f"{case.key}: no implementation and no original to compare {choice.candidates} with")
        candidates = [Alternative(each.name, each.run) for each in choice.candidates]
        measured = {each.name: self._measured(case, each) for each in (*candidates, usual)}
        winner = faster([(each.name, measured[each.name]) for each in choice.candidates], measured[usual.name])
        taken = next((each for each in choice.candidates if each.name == winner), None)
        return Verdict(case, taken, usual.name, MappingProxyType(measured))

    def _measured(self, case: Case, alternative: Alternative) -> Measured:
        found = self.kept.of(case.key, alternative.name)
        if found is None:
            found = measure(case, alternative, self.device, self.stopwatch)
            if found.wrong != OUT_OF_MEMORY:  # says nothing of the next process
                self.kept.keep(case.key, alternative.name, found)
        return found


def _milliseconds(measured: Measured) -> str:
    return measured.wrong if measured.seconds is None else f"{measured.seconds * 1e3:.3g} ms"
