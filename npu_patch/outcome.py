"""What happened at each site, and the report that says so: as a table, as JSON, live counters included."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PATCHED, SKIPPED, FAILED = "patched", "skipped", "failed"


@dataclass
class Calls:
    """How often a replacement ran, and how often it called the original instead, and why.

    `active` turns false when the site is restored: a reference to the replacement that somebody captured meanwhile
    (a hook's bound method, a `from ... import`) then behaves as the original.
    A replacement with several implementations counts in `ran_by` which one ran, and says in `declined` why another was
    passed over when it was last asked.
    """

    active: bool = True
    ran: int = 0
    fell_through: Counter[str] = field(default_factory=Counter)
    ran_by: Counter[str] = field(default_factory=Counter)
    declined: dict[str, str] = field(default_factory=dict)

    def deactivate(self) -> None:
        self.active = False


@dataclass
class Outcome:
    """One site: `patch` is the patch's name, `site` the dotted name of what was found, `status` what became of it."""

    patch: str
    site: str
    status: str
    reason: str = ""
    variant: str = ""
    implementation: str = ""
    declined: Mapping[str, str] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    layers: int | None = None  # live modules of the given model that it reaches; None where no model was given

    def as_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch,
            "site": self.site,
            "status": self.status,
            "reason": self.reason,
            "variant": self.variant,
            "implementation": self.implementation,
            "declined": {**self.declined, **self.calls.declined},
            "layers": self.layers,
            "ran": self.calls.ran,
            "ran_by": dict(self.calls.ran_by),
            "fell_through": dict(self.calls.fell_through),
        }


@dataclass
class Report:
    """The outcomes of an `apply()`. Counters are live: print it again after a forward pass."""

    device: str
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    def with_status(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def patched(self) -> list[Outcome]:
        return self.with_status(PATCHED)

    @property
    def skipped(self) -> list[Outcome]:
        return self.with_status(SKIPPED)

    @property
    def failed(self) -> list[Outcome]:
        return self.with_status(FAILED)

    def json(self, indent: int | None = 2) -> str:
        content = {
            "device": self.device,
            "notes": self.notes,
            "warnings": self.warnings,
            "outcomes": [outcome.as_dict() for outcome in self.outcomes],
        }
        return json.dumps(content, indent=indent)

    def __str__(self) -> str:
        lines = [f"npu_patch on {self.device}"]
        lines += _table(("patch", "status", "sites", "layers", "what", "ran", "fell through"), _rows(self.outcomes))
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"WARNING: {warning}" for warning in self.warnings]
        return "\n".join(lines)


def _rows(outcomes: Iterable[Outcome]) -> list[tuple[str, ...]]:
    """One row for all sites of a patch that share status, variant, implementation and reason."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        key = (outcome.patch, outcome.status, outcome.variant, outcome.implementation, outcome.reason)
        groups.setdefault(key, []).append(outcome)
    return [_row(members) for members in groups.values()]


def _row(members: list[Outcome]) -> tuple[str, ...]:
    first = members[0]
    layers = [member.layers for member in members if member.layers is not None]
    what = f"{first.variant} -> {_implementations(members)}" if first.status == PATCHED else first.reason
    fell_through: Counter[str] = sum((member.calls.fell_through for member in members), Counter())
    reasons = "; ".join(f"{count} ({reason})" for reason, count in fell_through.most_common())
    return (
        first.patch,
        first.status,
        str(len(members)),
        str(sum(layers)) if layers else "-",
        f"{what}: {_names(members)}",
        str(sum(member.calls.ran for member in members)) if first.status == PATCHED else "-",
        reasons or ("0" if first.status == PATCHED else "-"),
    )


def _implementations(members: list[Outcome]) -> str:
    """The one chosen; after a forward pass those that ran, and why the chosen one did not."""
    chosen = members[0].implementation
    ran_by: Counter[str] = sum((member.calls.ran_by for member in members), Counter())
    if not ran_by or list(ran_by) == [chosen]:
        return chosen
    names = ", ".join(f"{name} ({count})" for name, count in ran_by.most_common())
    declined = [member.calls.declined[chosen] for member in members if chosen in member.calls.declined]
    return f"{names}, not {chosen} ({declined[0]})" if declined and chosen not in ran_by else names


def _names(members: list[Outcome], most: int = 3) -> str:
    names = list(dict.fromkeys(_short_name(member.site) for member in members))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _short_name(site: str) -> str:
    return site.removesuffix(".forward").rsplit(".", 1)[-1]


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return ["(no site was found)"]
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    ruler = tuple("-" * width for width in widths)
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, ruler, *rows]
    ]
