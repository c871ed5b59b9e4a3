"""What is applied in this process: the one journal, what stands in it, and for which device."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass, field

import torch

from npu_patch.applying import new_layers, taken_since
from npu_patch.applying.patched_site import PatchedSite
from npu_patch.numerics.findings import forget
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.sites.journal import Journal


class PatchError(RuntimeError):
    """`apply()` could not do what was asked; nothing of that call is left applied."""


@dataclass(frozen=True)
class Prepared:
    """A model, and what a preparation did to it."""

    model: weakref.ref[torch.nn.Module]
    outcome: Outcome

    def shares_layers_with(self, other: torch.nn.Module) -> bool:
        own = self.model()
        return own is not None and not {id(each) for each in own.modules()}.isdisjoint(map(id, other.modules()))


@dataclass
class State:
    """The one journal of the process, and what stands in it."""

    journal: Journal = field(default_factory=Journal)
    # By (id of the owner, name): the patches of one site, the last one around the others.
    patched: dict[tuple[int, str], list[PatchedSite]] = field(default_factory=dict)
    prepared: dict[tuple[int, str], Prepared] = field(default_factory=dict)  # by (id of the model, preparation)
    reports: list[Report] = field(default_factory=list)
    device_type: str | None = None
    registries: set[tuple[int, str]] = field(default_factory=set)  # keys of `patched` that serve layers of any class
    tune: str | None = None  # the tuning file of the first apply()
    unreached: weakref.WeakSet[torch.nn.Module] = field(default_factory=weakref.WeakSet)  # layers, and said to be
    layers: taken_since.Layers = field(default_factory=weakref.WeakKeyDictionary)
    seen: taken_since.Seen = field(default_factory=taken_since.Seen)
    half_executed: list[new_layers.HalfExecuted] = field(default_factory=list)  # modules, when an apply() came

    def claim(self, device_type: str) -> None:
        if len(self.journal) and self.device_type != device_type:
            raise PatchError(
                f"apply(device={device_type!r}): patches for {self.device_type!r} are in place; call restore() first"
            )
        self.device_type = device_type

    def tuned_by(self, path: str | None) -> list[str]:
        """Keeps the tuning file of the first `apply()`; a warning where a later one has another."""
        if not self.reports:
            self.tune = path
        if self.tune == path:
            return []
        return [
            f"TWINKLE_NPU_TUNE is {path or 'not set'} now and was {self.tune or 'not set'} before: what "
            "an earlier apply() rebound stays as it was; call restore() first"
        ]

    def note_layers(self, model: torch.nn.Module | None) -> None:
        if model is not None:
            taken_since.note_layers(model, self.patched, self.layers)

    def taken_since(self) -> list[str]:
        return taken_since.in_words(self.patched, self.layers, self.unreached, self.seen)

    def watch_layers(self) -> None:
        """Those that are made from now on, and what becomes of all of them."""
        if not self.journal.holds(new_layers.REGISTRY, new_layers.KEY):
            made = new_layers.watcher(self.patched, self.registries, self.half_executed, self.layers)
            self.journal.rebind(new_layers.REGISTRY, new_layers.KEY, made)
            before = self.seen.hook(lambda: taken_since.layers_taken(self.patched, self.layers, self.unreached))
            self.journal.rebind(taken_since.FIRST_STEP, new_layers.KEY, before)

    def undo_to(self, mark: int) -> None:
        with self.journal.lock:
            self.journal.undo_to(mark)
            self.reports = [each for each in self.reports if mark and any(o.is_in_place for o in each)]
            if not len(self.journal):
                self.device_type = None
                self.unreached.clear()
                self.layers.clear()
                self.seen = taken_since.Seen()
                forget()


STATE = State()
# A process that is forked while another thread applies or restores would find half of it done, and the lock taken.
os.register_at_fork(
    before=STATE.journal.lock.acquire,
    after_in_parent=STATE.journal.lock.release,
    after_in_child=STATE.journal.lock.release,
)


def patched_sites(report: Report | None = None) -> list[PatchedSite]:
    """What stands at the sites that are patched now; of one report, if it is given."""
    every = [held for stack in STATE.patched.values() for held in stack]
    if report is None:
        return every
    own = {id(outcome) for outcome in report.outcomes}
    return [held for held in every if id(held.outcome) in own]


def anything_applied() -> bool:
    return len(STATE.journal) > 0
