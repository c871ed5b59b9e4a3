"""One `apply()`, or what it would do: the catalogue in order, over what is in scope, site by site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from npu_patch.applying.binding import Bind
from npu_patch.applying.choosing import Choosing, LeftAsTuned
from npu_patch.applying.enabling import ChoiceOf, Enabled, enabled
from npu_patch.applying.finding import Searched, searches, taken_by_others
from npu_patch.applying.options_kept import Kept, kept_at
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.request import Request
from npu_patch.applying.state import STATE, PatchError, patched_sites
from npu_patch.ops.readings import NotRead
from npu_patch.patches.patch import AnyContext, AnyPatch, Context, Replacement
from npu_patch.reporting.outcome import FAILED, PATCHED, SKIPPED, Outcome
from npu_patch.reporting.report import Report
from npu_patch.sites import replaced_before
from npu_patch.sites.scope import Scope
from npu_patch.sites.sites import Site


@dataclass
class Walk:
    """`choice_of` names what serves a patch; `bind` puts it there. What became of each site is in `report`."""

    catalogue: Sequence[AnyPatch]
    request: Request
    report: Report
    choice_of: ChoiceOf
    choosing: Choosing
    bind: Bind
    searched: Searched = field(default_factory=set)
    kept_options: Counter[Kept] = field(default_factory=Counter)  # by sites

    def enabled(self) -> list[Enabled]:
        return enabled(self.catalogue, self.request, self.choice_of, self.report)

    def over(self, scope: Scope, entries: Sequence[Enabled]) -> None:
        entries = [each for each in entries if each.patch.concerns(scope.live)]
        needed = {name for patch, _ in entries for name in patch.needs}
        for entry in entries:
            patch, choice = entry
            context: AnyContext = Context(patch.op, choice, self.request.device_type, self.request.switches, scope.live)
            for site in self._found(patch, scope):
                self._visit(entry, site, context, needed)
        known = {each.site for each in self.report} | {held.site.label for held in patched_sites()}
        self.report.outcomes += taken_by_others(scope, self.catalogue, {patch.name for patch, _ in entries}, known)

    def _found(self, patch: AnyPatch, scope: Scope) -> Iterator[Site]:
        for where, search in searches(patch, scope, self.searched):
            try:
                yield from list(search())
            except Exception as error:
                self._failed(patch, where, error)

    def _visit(self, entry: Enabled, site: Site, context: AnyContext, needed: Collection[str]) -> None:
        patch, stack = entry.patch, STATE.patched.get((id(site.owner), site.name), ())
        layers = patch.layers(site, context)
        for held in stack:
            if held.outcome.patch == patch.name:
                self._found_again(held, patch, layers, context)
                return
        if not (patch.around or all(held.around for held in stack)):
            return
        theirs = replaced_before.by_whom(site)
        try:
            with STATE.journal.transaction():
                decision = self.choosing.at(site, entry, context, needed)
                if isinstance(decision, Replacement):
                    self._bind(entry, site, decision, layers)
                    if theirs is not None:
                        self.report.notes.append(f"{patch.name}: {site.label} was {theirs}; this patch is on top of it")
                elif isinstance(decision, LeftAsTuned):
                    self._skip(patch, site, decision, layers)
                elif decision.notable or replaced_before.is_notable(site, patch.called):
                    self._skip(patch, site, NotRead(theirs) if theirs else decision, layers)
        except Exception as error:
            self._failed(patch, site.label, error)

    def _found_again(self, held: PatchedSite, patch: AnyPatch, layers: int | None, context: AnyContext) -> None:
        """At a site that an earlier call bound, for another model perhaps."""
        held.outcome.layers = layers
        self.kept_options.update(kept_at(held, patch, self.request.switches))
        self.choosing.decisions.add(held.replacement.dispatch, context.live)
        self.choosing.decisions.describe(held.replacement.dispatch, held.outcome)
        self.report.outcomes.append(held.outcome)

    def _bind(self, entry: Enabled, site: Site, replacement: Replacement, layers: int | None) -> None:
        patch, choice = entry.patch, replacement.choice or entry.choice
        outcome = Outcome(
            patch.name,
            site.label,
            PATCHED,
            variant=replacement.variant,
            implementation=choice.chosen.name if choice.chosen else "",
            declined=choice.declined,
            calls=replacement.calls,
            layers=layers,
            unshown=replacement.unshown,
        )
        self.choosing.decisions.describe(replacement.dispatch, outcome)
        self.bind(PatchedSite(site, replacement, outcome, patch.around, self.request.switches))
        self.report.outcomes.append(outcome)

    def _skip(self, patch: AnyPatch, site: Site, why: NotRead, layers: int | None) -> None:
        outcome = Outcome(patch.name, site.label, SKIPPED, why.reason, layers=layers, in_order=why.in_order)
        self.report.outcomes.append(outcome)

    def _failed(self, patch: AnyPatch, label: str, error: Exception) -> None:
        if self.request.strict:
            raise PatchError(f"{patch.name}: {label}: {type(error).__name__}: {error}") from error
        self.report.outcomes.append(Outcome(patch.name, label, FAILED, f"{type(error).__name__}: {error}"))
