"""What stands at one site: what the patch makes of it, and what a tuning file chooses instead for some shapes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from npu_patch.applying.enabling import Enabled
from npu_patch.applying.request import Request
from npu_patch.measuring import from_rank_0
from npu_patch.measuring.decision import ORIGINAL, Decision
from npu_patch.measuring.self_check import Decisions
from npu_patch.measuring.tuning import content_of, followed
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import AnyContext, AnyPatch, Replacement
from npu_patch.reporting.outcome import TuningFile
from npu_patch.reporting.report import Report
from npu_patch.serving.dispatch import AnyDispatch
from npu_patch.sites.sites import Site

TUNED = "tuned"  # turns of a job's ranks


class LeftAsTuned(NotRead):
    """Every call that was measured is fastest as the original."""


@dataclass(frozen=True)
class Choosing:
    """`decisions` is told of each dispatch whose cases wait for a measurement. `tuned`: a tuning file's, by patch, site
    and variant."""

    decisions: Decisions
    tuned: Mapping[tuple[str, str, str], Sequence[Decision]] = field(default_factory=dict)

    def at(self, site: Site, entry: Enabled, context: AnyContext, needed: Collection[str]) -> Replacement | NotRead:
        """What `entry.patch` puts there, or why nothing. `needed`: patches on whose sites others build."""
        patch = entry.patch
        reading = patch.read(site)
        decision = reading if isinstance(reading, NotRead) else patch.bind(site, reading, context)
        if isinstance(decision, NotRead):
            return decision
        tuned = self.tuned.get((patch.name, site.label, decision.variant), ()) if patch.tunable else ()
        if tuned and patch.name not in needed and {each.choice for each in tuned} == {ORIGINAL}:
            decision.calls.deactivate()
            return LeftAsTuned(_words(tuned), in_order=True)
        if tuned and decision.dispatch is not None:
            tune(decision.dispatch, tuned)
        self.decisions.add(decision.dispatch, context.live)
        return decision


def tune(dispatch: AnyDispatch, decisions: Iterable[Decision]) -> None:
    """Its calls go as decided; as usual where this machine or device cannot run what is chosen."""
    decisions = list(decisions)
    absent = {name for name, why in dispatch.choice.declined.items() if not why.endswith("comes first")}
    found = {each.name: None if each.name in absent else each for each in dispatch.op.implementations}
    dispatch.tuned = {
        each.signature: each.words if each.choice == ORIGINAL else found.get(each.choice) for each in decisions
    }
    dispatch.tuned_words = _words(decisions)


def _words(decisions: Iterable[Decision]) -> str:
    return "; ".join(dict.fromkeys(each.words for each in decisions))


def tuning_for(
    catalogue: Iterable[AnyPatch], request: Request, report: Report
) -> Mapping[tuple[str, str, str], Sequence[Decision]]:
    """What the tuning file decides here; `report` is told which one it is, or why it is not used."""
    path, catalogue = request.switches.tune, tuple(catalogue)
    content = _content(path, report)
    if path is None or content is None:
        return {}
    accepted = {patch.name: _choices(patch, request.device_type) for patch in catalogue}
    file = followed(path, content, request.device_type, accepted)
    if isinstance(file, str):
        report.warnings.append(f"the tuning file {path} is not used: {file}")
        return {}
    by_name = {(patch.name, each.name): each for patch in catalogue for op in patch.ops for each in op.implementations}
    for patch, name in sorted({(each.patch, each.choice) for each in file.decisions if each.choice != ORIGINAL}):
        absent = by_name[patch, name].missing()
        if absent is not None:
            report.warnings.append(f"the tuning file {path} chooses {name} for {patch}, absent here: {absent}")
    report.tuning = TuningFile(path, len(file.decisions), digest_of(content))
    found: dict[tuple[str, str, str], list[Decision]] = {}
    for each in file.decisions:
        found.setdefault(each.where, []).append(each)
    return found


def _content(path: str | None, report: Report) -> Any:
    """Of the file; of rank 0's, where this is another rank of a job. None where none is followed."""
    job = from_rank_0.job()
    if job is not None and job.rank != 0:
        if path is None:
            job.next_turn(TUNED)
            return None
        content, silent = job.take(job.next_turn(TUNED))
        if silent is None:
            if content is None:
                report.warnings.append(f"the tuning file {path} is not used: rank 0 follows none")
            return content
        report.notes.append(f"{silent}: this rank reads {path} for itself")
    content = None
    try:
        content = None if path is None else content_of(path)
    finally:
        if job is not None and job.rank == 0:
            job.give(job.next_turn(TUNED), content)
    return content


def digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _choices(patch: AnyPatch, device_type: str) -> list[str]:
    """What a tuning file may choose for it."""
    every = [each for op in patch.ops for each in op.implementations if device_type in each.device_types]
    return list(dict.fromkeys(each.name for each in every)) if patch.tunable else []
