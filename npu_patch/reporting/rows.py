"""The rows of a report: what its outcomes have in common, said once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from npu_patch.reporting.outcome import FAILED, PATCHED, PREPARED, SKIPPED, Outcome

MOST_ALIKE = 4  # patched classes with the same variant and implementation that get a row each


@dataclass(frozen=True)
class Row:
    """Sites of one patch that share a fate. `what`: variant and implementation, or the reason they were left alone."""

    patch: str
    status: str
    sites: tuple[Outcome, ...]
    what: str
    never_called: bool = False

    @property
    def names(self) -> list[str]:
        """Short names, each once, with the family where they do not say it; "x 94" where 94 sites have it."""
        counts = Counter(short_name(outcome.site) for outcome in self.sites)
        return [name if count == 1 else f"{name} x {count}" for name, count in counts.items()]

    @property
    def layers(self) -> int | None:
        known = [outcome.reached for outcome in self.sites if outcome.reached is not None]
        return sum(known) if known else None

    @property
    def ran(self) -> int:
        return sum(outcome.calls.ran for outcome in self.sites)

    @property
    def fell_through(self) -> Counter[str]:
        return sum((outcome.calls.fell_through for outcome in self.sites), Counter())


def rows(outcomes: Iterable[Outcome]) -> list[Row]:
    """By patch, in the order of the catalogue: what is patched or prepared, then what was skipped, then what failed.
    Once anything was called: what was called, what was left alone, and last what never was called, a row a patch."""
    outcomes = [each for each in outcomes if each.called or not each.unshown]
    if not any(each.called for each in outcomes if each.status == PATCHED):
        return _in_order(outcomes, (PATCHED, PREPARED, SKIPPED, FAILED))
    called = [each for each in outcomes if each.status != PATCHED or each.called]
    idle = [each for each in outcomes if each.status == PATCHED and not each.called]
    folded = [Row(patch, PATCHED, tuple(sites), "", True) for patch, sites in _by_patch(idle).items()]
    return _in_order(called, (PATCHED, PREPARED)) + _in_order(called, (SKIPPED, FAILED)) + folded


def _in_order(outcomes: Iterable[Outcome], statuses: Sequence[str]) -> list[Row]:
    return [
        row
        for members in _by_patch(outcomes).values()
        for status in statuses
        for row in _rows_of([outcome for outcome in members if outcome.status == status])
    ]


def _by_patch(outcomes: Iterable[Outcome]) -> dict[str, list[Outcome]]:
    by_patch: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_patch.setdefault(outcome.patch, []).append(outcome)
    return by_patch


def short_name(site: str) -> str:
    """`Qwen3RMSNorm` of `transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm.forward`, or of its `__call__`;
    `apply_rotary_pos_emb (qwen3)` of what many families have under one name."""
    name = site.removesuffix(".forward").removesuffix(".__call__").rsplit(".", 1)[-1]
    family = re.search(r"\.modeling_(\w+)\.", site)
    if family is None or name.lower().replace("_", "").startswith(family[1].replace("_", "")):
        return name
    return f"{name} ({family[1]})"


def _rows_of(outcomes: list[Outcome]) -> list[Row]:
    """Sites that share a reason are one row, and functions that do the same and were not called yet. Patched classes
    are a row each, for their counters, unless many do the same."""
    alike: dict[tuple[str, ...], dict[str, list[Outcome]]] = {}
    for outcome in outcomes:
        classes = alike.setdefault((outcome.variant, outcome.implementation, outcome.tuned, outcome.reason), {})
        classes.setdefault(outcome.site, []).append(outcome)
    found = []
    for classes in alike.values():
        groups = list(classes.values())
        functions = all(each.reached is None and not each.called for group in groups for each in group)
        if groups[0][0].status != PATCHED or len(groups) > MOST_ALIKE or functions:
            groups = [[outcome for group in groups for outcome in group]]
        found += [_row(group) for group in groups]
    return found


def _row(outcomes: list[Outcome]) -> Row:
    first = outcomes[0]
    what = first.reason
    if first.status == PATCHED:
        what = "; ".join(filter(None, (f"{first.variant} -> {_implementations(outcomes)}", first.tuned)))
    return Row(first.patch, first.status, tuple(outcomes), what)


def _implementations(outcomes: list[Outcome]) -> str:
    """The one chosen; after a forward pass those that ran, and why the chosen one did not."""
    chosen = outcomes[0].implementation
    ran_by: Counter[str] = sum((outcome.calls.ran_by for outcome in outcomes), Counter())
    if not ran_by or (len(ran_by) == 1 and chosen.split(" (")[0] in ran_by):  # in brackets: what was measured
        return chosen
    names = ", ".join(f"{name} ({count})" for name, count in ran_by.most_common())
    declined = [outcome.calls.declined[chosen] for outcome in outcomes if chosen in outcome.calls.declined]
    return f"{names}, not {chosen} ({declined[0]})" if declined and chosen not in ran_by else names
