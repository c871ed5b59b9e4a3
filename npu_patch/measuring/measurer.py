"""Turns cases into verdicts: from what was kept, else by measuring on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from npu_patch import devices
from npu_patch.measuring.measure import answers, check, clock, fastest, times
from npu_patch.measuring.measured_on import here
from npu_patch.measuring.measurements import Measurements, default_path
from npu_patch.serving.case import ACCIDENTS, DEVICE_LOST, Alternative, AnyCase, Clock, Measured
from npu_patch.serving.dispatch import AnyVerdict, Verdict, contenders
from npu_patch.serving.implementation import AnyChoice, AnyImplementation


@dataclass
class Measurer:
    """Turns cases into verdicts: from what was kept, else by measuring on `device`."""

    device: torch.device
    kept: Measurements
    clock: Clock
    _lost: bool = False

    @classmethod
    def of(cls, device_type: str, path: str | None) -> Measurer:
        device = devices.current(device_type)
        measured_on = here(device)
        kept = Measurements.read(Path(path) if path else default_path(measured_on), measured_on)
        return cls(device, kept, clock(device))

    def judge(self, case: AnyCase, choice: AnyChoice, others: Sequence[AnyImplementation] = ()) -> AnyVerdict:
        """Times all that could serve the case, where times decide; else checks them. `others` are checked only."""
        every, usual, timed = _competitors(case, choice)
        found = self._measured(case, every, timed)
        measured = MappingProxyType({**found, **self._measured(case, [*map(_alternative, others)], False)})
        if usual is None or not timed:
            return Verdict(case, None, "" if usual is None else usual.name, measured)
        winner = fastest(found, usual.name)
        taken = next((each for each in choice.candidates if each.name == winner), None)
        return Verdict(case, taken, usual.name, measured)

    def knows(self, case: AnyCase, choice: AnyChoice, others: Sequence[AnyImplementation] = ()) -> bool:
        """Whether nothing has to run for `judge`."""
        every, _, timed = _competitors(case, choice)
        known = [self.kept.found(case.title, each.name) for each in every]
        known_others = [self.kept.found(case.title, each.name) for each in others]
        return None not in known_others and not any(each is None or (timed and each == Measured()) for each in known)

    def _measured(self, case: AnyCase, alternatives: Sequence[Alternative], timed: bool) -> dict[str, Measured]:
        """Times are taken of all right ones together, or they could not be compared."""
        kept = {each.name: self.kept.found(case.title, each.name) for each in alternatives}
        found = {
            each.name: kept[each.name] or self._unless_lost(check(case, each, self.device)) for each in alternatives
        }
        right = [each for each in alternatives if found[each.name].wrong is None]
        if timed and any(found[each.name].seconds is None for each in right):
            timings = times(case, right, self.device, self.clock)
            found |= {name: self._unless_lost(each) for name, each in timings.items()}
        for name, each in found.items():
            if each != kept[name] and each.wrong not in ACCIDENTS:
                self.kept.keep(case.title, name, each)
        return found

    def _unless_lost(self, found: Measured) -> Measured:
        """One that may have taken the device along is wrong; of what comes after it nothing is known."""
        if found.wrong is None or found.wrong in ACCIDENTS:
            return found
        if self._lost:
            return Measured(DEVICE_LOST)
        self._lost = not answers(self.device)
        return found


def _competitors(case: AnyCase, choice: AnyChoice) -> tuple[list[Alternative], Alternative | None, bool]:
    """All that could serve the case, the usual one of them, and whether times decide."""
    candidates = choice.candidates if choice.forced else contenders(case, choice)
    timed = bool(candidates) and not choice.forced
    usual = None if choice.chosen is None else _alternative(choice.chosen)
    if timed and usual is None:
        usual = case.original
        if usual is None:
            raise ValueError(f"{case.title}: no implementation and no original to compare {choice.candidates} with")
    return [*map(_alternative, candidates), *([] if usual is None else [usual])], usual, timed


def _alternative(implementation: AnyImplementation) -> Alternative:
    return Alternative(implementation.name, implementation.run, implementation.unsupported)
