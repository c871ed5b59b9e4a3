"""What one `apply(model)` has to find out on the device: which implementations are right there, and which are faster.

Probes prove what a site's original computes; nothing in them proves that this device's operator does. So every
implementation that the model would use is run once for each of the model's sizes and dtypes, forward and backward,
against float64 (measuring/measure.py). Verdicts are kept between processes, in the file of the times. What is wrong
serves no such call; what could not be decided within BUDGET_S is decided by a later `apply(model)`. Of the ranks of a
job the first one measures.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from npu_patch import log
from npu_patch.devices import is_simulated
from npu_patch.measuring import from_rank_0
from npu_patch.measuring.measurements import Measurements
from npu_patch.measuring.measurer import Measurer
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.serving.case import AnyCase
from npu_patch.serving.dispatch import AnyDispatch, AnyVerdict
from npu_patch.sites.journal import Journal
from npu_patch.sites.sites import LiveModules
from npu_patch.switches import Switches

BUDGET_S = 10.0
SHOWN_AFTER_S = 1.0
MEASURED = "measured"  # turns of a job's ranks
NO_MODEL = "no model was given: no operator was checked on this device yet"


def wanted(switches: Switches, device_type: str) -> bool:
    """On a real device, unless it is switched off; elsewhere only where it was asked for by name: the CPU computes by
    the definitions themselves, and the simulated NPU by the operators' documentation."""
    if not switches["self_check"]:
        return False
    real = device_type == "cuda" or (device_type == "npu" and not is_simulated())
    return real or switches.sources["self_check"] != "default"


@dataclass
class Decisions:
    """Of one `apply()`: what its sites wait for, then decided all at once."""

    device_type: str
    path: str | None
    checked: bool
    waiting: list[tuple[AnyDispatch, dict[Hashable, AnyCase]]] = field(default_factory=list)
    described: list[tuple[AnyDispatch, Outcome]] = field(default_factory=list)

    @classmethod
    def of(cls, switches: Switches, device_type: str) -> Decisions:
        return cls(device_type, switches["triton_cache"], wanted(switches, device_type))

    def add(self, dispatch: AnyDispatch | None, live: LiveModules | None) -> None:
        """Of a site of the given model, or of none."""
        if dispatch is not None and live is not None:
            cases = dispatch.undecided(live, self.checked)
            if cases:
                self.waiting.append((dispatch, cases))

    def describe(self, dispatch: AnyDispatch | None, outcome: Outcome) -> None:
        """In `outcome` it will be said what was decided."""
        if dispatch is not None:
            outcome.describe(dispatch)
            self.described.append((dispatch, outcome))

    def decide(self, journal: Journal, report: Report) -> None:
        job = from_rank_0.job()
        turn = "" if job is None else job.next_turn(MEASURED)
        measurer = Measurer.of(self.device_type, self.path) if self.waiting else None
        try:
            if measurer is not None:
                if job is not None and job.rank != 0 and not self._all_known(measurer):
                    report.notes += filter(None, [_taken(job.take(turn), measurer.kept)])
                self._decide(measurer, journal, report)
        finally:
            if measurer is not None:
                measurer.kept.save_changes()
            if job is not None and job.rank == 0:
                job.give(turn, None if measurer is None else measurer.kept.content())
        for dispatch, outcome in self.described:
            outcome.describe(dispatch)
        for dispatch in [each for each, _ in (*self.waiting, *self.described)]:
            for (name, _), why in dispatch.wrong.items():
                line = f"{name} is wrong on this device and serves no such call: {why}"
                if line not in report.warnings:
                    report.warnings.append(line)

    def _all_known(self, measurer: Measurer) -> bool:
        waiting = ((dispatch, case) for dispatch, cases in self.waiting for case in cases.values())
        return all(measurer.knows(case, dispatch.choice, dispatch.tuned_to) for dispatch, case in waiting)

    def _decide(self, measurer: Measurer, journal: Journal, report: Report) -> None:
        """Checks come before times, which take longer."""
        deadline, left = time.monotonic() + BUDGET_S, 0
        self.waiting.sort(key=lambda each: each[0].timed)
        with _progress(sum(len(cases) for _, cases in self.waiting)) as done:
            for dispatch, cases in self.waiting:
                verdicts: dict[Hashable, AnyVerdict] = {}
                for key, case in cases.items():
                    competitors = case, dispatch.choice, dispatch.tuned_to
                    if time.monotonic() < deadline or measurer.knows(*competitors):
                        verdicts[key] = measurer.judge(*competitors)
                    done()
                left += len(cases) - len(verdicts)
                journal.rebind(dispatch, "verdicts", {**dispatch.verdicts, **verdicts})
                faster = {key: each.taken for key, each in verdicts.items() if each.taken is not None}
                journal.rebind(dispatch, "faster", {**dispatch.faster, **faster})
                wrong = {(name, key): why for key, each in verdicts.items() for name, why in each.wrong.items()}
                if self.checked and wrong:
                    journal.rebind(dispatch, "wrong", {**dispatch.wrong, **wrong})
                    note = f"what was found wrong on this device is kept in {measurer.kept.path}"
                    if note not in report.notes:
                        report.notes.append(note)
        if left:
            report.notes.append(
                f"{left} checks of operators did not fit into {BUDGET_S:.0f} s: the next apply(model) goes on with them"
            )


def _taken(given: tuple[Any, str | None], kept: Measurements) -> str | None:
    """Why a rank does not have what rank 0 gave, if so."""
    content, silent = given
    if silent is not None:
        return f"{silent}: this rank measured for itself"
    why_not = None if content is None else kept.take(content)
    return why_not and f"what rank 0 measured does not hold on this rank, which measured for itself: {why_not}"


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], object]]:
    """A bar on stderr of the first process, once it takes longer than a moment, if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(
        total=total,
        desc="npu_patch: operators on this device",
        delay=SHOWN_AFTER_S,
        leave=False,
        file=sys.stderr,
        disable=log.rank() != 0,
    ) as bar:
        yield bar.update
