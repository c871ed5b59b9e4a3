"""What stands at one site: what the patch makes of it, and what a tuning file chooses instead for some shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from npu_patch.applying.enabling import Enabled
from npu_patch.applying.request import Request
from npu_patch.measuring.self_check import Decisions
from npu_patch.measuring.tuning import ORIGINAL, Tuning, read
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import AnyContext, AnyPatch, Replacement
from npu_patch.reporting.outcome import TuningFile
from npu_patch.reporting.report import Report
from npu_patch.serving.dispatch import TUNED_TO_ORIGINAL
from npu_patch.serving.implementation import AnyImplementation
from npu_patch.serving.signature import Signature
from npu_patch.sites.sites import Site

TUNED_ORIGINAL = "tuned: the original is the fastest for every shape that was measured"
LEFT_AS_TUNED = NotRead(TUNED_ORIGINAL, in_order=True)


@dataclass(frozen=True)
class Choosing:
    """`decisions` is told of each dispatch whose cases wait for a measurement."""

    decisions: Decisions
    tuning: Tuning = field(default_factory=Tuning)

    def at(self, site: Site, entry: Enabled, context: AnyContext) -> Replacement | NotRead:
        """What `entry.patch` puts there, or why nothing."""
        patch = entry.patch
        reading = patch.read(site)
        decision = reading if isinstance(reading, NotRead) else patch.bind(site, reading, context)
        if isinstance(decision, NotRead):
            return decision
        names = self.tuning.of(patch.name, site.label, decision.variant) if patch.tunable else {}
        if names and set(names.values()) == {ORIGINAL}:
            decision.calls.deactivate()
            return LEFT_AS_TUNED
        if names and decision.dispatch is not None:
            decision.dispatch.tuned = _decided(names, entry)
        self.decisions.add(decision.dispatch, context.live)
        return decision


def _decided(names: Mapping[Signature, str], entry: Enabled) -> dict[Signature, AnyImplementation | str | None]:
    """What a file's choices, by name, are here: None for one that this machine or device cannot run."""
    absent = {name for name, why in entry.choice.declined.items() if not why.endswith("comes first")}
    found: dict[str, AnyImplementation | str] = {each.name: each for each in entry.patch.op.implementations}
    found[ORIGINAL] = TUNED_TO_ORIGINAL
    return {signature: None if name in absent else found[name] for signature, name in names.items()}


def tuning_for(catalogue: Iterable[AnyPatch], request: Request, report: Report) -> Tuning:
    """What the tuning file decides here; `report` is told which one it is, or why it is not used."""
    path, catalogue = request.switches.tune, tuple(catalogue)
    if path is None:
        return Tuning()
    tuning = read(path, request.device_type, {patch.name: _choices(patch, request.device_type) for patch in catalogue})
    if tuning.refused is not None:
        report.warnings.append(f"the tuning file {path} is not used: {tuning.refused}")
        return Tuning()
    by_name = {(patch.name, each.name): each for patch in catalogue for each in patch.op.implementations}
    for patch, name in sorted(tuning.choices):
        absent = by_name[patch, name].missing()
        if absent is not None:
            report.warnings.append(f"the tuning file {path} chooses {name} for {patch}, absent here: {absent}")
    report.tuning = TuningFile(path, tuning.count)
    return tuning


def _choices(patch: AnyPatch, device_type: str) -> list[str]:
    """What a tuning file may choose for it."""
    return [each.name for each in patch.op.implementations if patch.tunable and device_type in each.device_types]
