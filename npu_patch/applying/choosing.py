"""What stands at one site: what the patch makes of it, and what a tuning file chooses instead for some shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from npu_patch.applying.enabling import Enabled
from npu_patch.applying.request import Request
from npu_patch.measuring.self_check import Decisions
from npu_patch.measuring.tuning import ORIGINAL, Signature, Tuning, read, tuned
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import Context, Patch, Replacement
from npu_patch.reporting.outcome import TuningFile
from npu_patch.reporting.report import Report
from npu_patch.serving.implementation import Choice
from npu_patch.sites.sites import Site

TUNED_ORIGINAL = "tuned: the original is the fastest for every shape that was measured"
LEFT_AS_TUNED = NotRead(TUNED_ORIGINAL)


@dataclass(frozen=True)
class Choosing:
    """`decisions` is told of each dispatch whose cases wait for a measurement."""

    decisions: Decisions
    tuning: Tuning = field(default_factory=Tuning)

    def at(self, site: Site, entry: Enabled, context: Context) -> Replacement | NotRead:
        """What `entry.patch` puts there, or why nothing."""
        patch = entry.patch
        decision = patch.replace(site, context)
        if isinstance(decision, NotRead):
            return decision
        self.decisions.add(decision.dispatch, context.live)
        choices = self.tuning.of(patch.name, site.label, decision.variant) if patch.tunable else {}
        if choices and set(choices.values()) == {ORIGINAL}:
            decision.calls.deactivate()
            return LEFT_AS_TUNED
        return self._tuned(site, entry, decision, choices, context) if choices else decision

    def _tuned(
        self,
        site: Site,
        entry: Enabled,
        replacement: Replacement,
        choices: Mapping[Signature, str],
        context: Context,
    ) -> Replacement:
        """The replacement, with the choices of the tuning file."""
        patch, choice = entry
        others = {
            each.name: patch.replace(site, replace(context, choice=Choice(each, {})))
            for each in patch.op.implementations
            if each.name in choices.values()
            and each.name not in _absent(choice)
            and (each is not choice.chosen or choice.candidates)  # the usual one, unless that may be a Triton kernel
        }
        for other in others.values():
            self.decisions.add(getattr(other, "dispatch", None), context.live)
        ways = {name: (other.function, other.calls) for name, other in others.items() if isinstance(other, Replacement)}
        function = tuned(replacement.function, site.original, replacement.calls, choices, ways)
        return replace(replacement, function=function)


def _absent(choice: Choice) -> set[str]:
    """Implementations that this machine or device cannot run."""
    return {name for name, why in choice.declined.items() if not why.endswith("comes first")}


def tuning_for(catalogue: Iterable[Patch], request: Request, report: Report) -> Tuning:
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


def _choices(patch: Patch, device_type: str) -> list[str]:
    """What a tuning file may choose for it."""
    return [each.name for each in patch.op.implementations if patch.tunable and device_type in each.device_types]
