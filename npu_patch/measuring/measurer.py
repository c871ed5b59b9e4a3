"""Turns cases into verdicts: from what was kept, else by measuring on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from npu_patch import devices
from npu_patch.measuring.measure import answers, check, faster, measure, stopwatch
from npu_patch.measuring.measured_on import here
from npu_patch.measuring.measurements import Measurements, default_path
from npu_patch.serving.case import ACCIDENTS, DEVICE_LOST, Alternative, AnyCase, Measured, Stopwatch
from npu_patch.serving.dispatch import AnyVerdict, Verdict, contenders
from npu_patch.serving.implementation import AnyChoice, AnyImplementation


@dataclass
class Measurer:
    """Turns cases into verdicts: from what was kept, else by measuring on `device`."""

    device: torch.device
    kept: Measurements
    stopwatch: Stopwatch
    _lost: bool = False

    @classmethod
    def of(cls, device_type: str, path: str | None) -> Measurer:
        device = devices.current(device_type)
        measured_on = here(device)
        kept = Measurements.read(Path(path) if path else default_path(measured_on), measured_on)
        return cls(device, kept, stopwatch(device))

    def judge(self, case: AnyCase, choice: AnyChoice, others: Sequence[AnyImplementation] = ()) -> AnyVerdict:
        """Times all that could serve the case, where times decide; else checks them. `others` are checked only."""
        every, usual, timed = _competitors(case, choice)
        measured = {each.name: self._measured(case, each, timed) for each in every}
        measured |= {each.name: self._measured(case, _alternative(each), False) for each in others}
        if usual is None or not timed:
            return Verdict(case, None, "" if usual is None else usual.name, MappingProxyType(measured))
        alternatives = [(each.name, measured[each.name]) for each in every if each is not usual]
        winner = faster(alternatives, measured[usual.name])
        taken = next((each for each in choice.candidates if each.name == winner), None)
        return Verdict(case, taken, usual.name, MappingProxyType(measured))

    def knows(self, case: AnyCase, choice: AnyChoice, others: Sequence[AnyImplementation] = ()) -> bool:
        """Whether nothing has to run for `judge`."""
        every, _, timed = _competitors(case, choice)
        known = [self.kept.of(case.title, each.name) for each in every]
        known_others = [self.kept.of(case.title, each.name) for each in others]
        return None not in known_others and not any(each is None or (timed and each == Measured()) for each in known)

    def _measured(self, case: AnyCase, alternative: Alternative, timed: bool) -> Measured:
        found = self.kept.of(case.title, alternative.name)
        if found is None or (timed and found == Measured()):
            if timed:
                found = measure(case, alternative, self.device, self.stopwatch)
            else:
                found = check(case, alternative, self.device)
            if found.wrong is not None and not self._lost and not answers(self.device):
                self._lost = True
            elif found.wrong is not None and self._lost:
                found = Measured(DEVICE_LOST)
            if found.wrong not in ACCIDENTS:
                self.kept.keep(case.title, alternative.name, found)
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
