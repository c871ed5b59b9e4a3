"""What happened at each site, live counters included. report.py says it, by rows.py (what is put together), text.py and
page.py; actions.py has what a user can do about it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from npu_patch.reporting.actions import what_to_do
from npu_patch.serving.calls import Calls

PATCHED, PREPARED, SKIPPED, FAILED = "patched", "prepared", "skipped", "failed"
NOTHING_APPLIED = "nothing is applied"


@dataclass
class Outcome:
    """One site: `patch` is the patch's name, `site` the dotted name of what was found, `status` what became of it. Or a
    model: `patch` is the preparation's name, `site` that of the model's class, `layers` how many were changed."""

    patch: str
    site: str
    status: str
    reason: str = ""
    variant: str = ""
    implementation: str = ""
    tuned: str = ""  # what a tuning file decides, in words
    declined: Mapping[str, str] = field(default_factory=dict)
    calls: Calls = field(default_factory=Calls)
    layers: int | None = None  # live modules of the given model that it reaches; None where no model was given
    made: int = 0  # layers that it reaches and that were made since
    in_order: bool = False  # skipped, and nothing to warn of
    unshown: bool = False  # in the report's table until it is called

    @property
    def is_in_place(self) -> bool:
        """Patched or prepared, and not undone since."""
        return self.status in (PATCHED, PREPARED) and self.calls.active

    @property
    def reached(self) -> int | None:
        """Layers of the given model; without one, those that were made since."""
        return self.layers if self.layers is not None else self.made or None

    @property
    def called(self) -> bool:
        return bool(self.calls.ran or self.calls.fell_through)

    def describe(self, dispatch: Any) -> None:
        """Takes what serves the site and why others do not from its `Dispatch`."""
        self.implementation, self.declined = dispatch.name(), dispatch.declined()
        self.tuned = dispatch.tuned_words

    def as_dict(self) -> dict[str, Any]:
        return {
            "patch": self.patch,
            "site": self.site,
            "status": self.status,
            "reason": self.reason,
            "variant": self.variant,
            "implementation": self.implementation,
            "declined": {**self.declined, **self.calls.declined},
            "layers": self.reached,
            "ran": self.calls.ran,
            "tuned": self.calls.tuned,
            "decided": self.tuned,
            "ran_by": dict(self.calls.ran_by),
            "fell_through": dict(self.calls.fell_through),
            "actions": {reason: action for reason in self.calls.fell_through if (action := what_to_do(reason))},
        }


@dataclass(frozen=True)
class TuningFile:
    """The one that an `apply()` followed, how many decisions it holds, and by what ranks know it."""

    path: str
    decisions: int
    digest: str


@dataclass
class Outcomes:
    """Those of an `apply()`, with what it noted and warned of. `nothing_because`: why no site was even looked for."""

    device: str
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    tuning: TuningFile | None = None
    nothing_because: str | None = None

    def __iter__(self) -> Iterator[Outcome]:
        return iter(self.outcomes)

    @property
    def remarks(self) -> list[str]:
        """The notes, and how much the tuning file counted so far."""
        if self.tuning is None:
            return self.notes
        matched = sum(outcome.calls.tuned for outcome in self.outcomes)
        return [
            *self.notes,
            f"tuning file {self.tuning.path}: {self.tuning.decisions} decisions; {matched} calls had their shapes",
        ]

    def with_status(self, status: str) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.status == status]

    @property
    def patched(self) -> list[Outcome]:
        return self.with_status(PATCHED)

    @property
    def prepared(self) -> list[Outcome]:
        return self.with_status(PREPARED)

    @property
    def skipped(self) -> list[Outcome]:
        return self.with_status(SKIPPED)

    @property
    def failed(self) -> list[Outcome]:
        return self.with_status(FAILED)
