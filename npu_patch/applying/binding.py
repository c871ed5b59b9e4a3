"""Who puts replacements where they belong."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import STATE, patched_sites
from npu_patch.sites.sites import Site
from npu_patch.waiting.heads import enter, leave


class Binder(Protocol):
    """What a walk asks of the one that binds."""

    def in_place(self) -> Sequence[PatchedSite]:
        """What earlier calls bound, and this one."""

    def stack(self, site: Site) -> Sequence[PatchedSite]:
        """What is bound at one site, the last one around the others."""

    def transaction(self) -> AbstractContextManager[None]:
        """All that is bound within it, or nothing."""

    def bind(self, patched: PatchedSite) -> None:
        """Puts the replacement there."""


class JournalBinder:
    """Binds, through the one journal of the process."""

    def in_place(self) -> Sequence[PatchedSite]:
        return patched_sites()

    def stack(self, site: Site) -> Sequence[PatchedSite]:
        return STATE.patched.get((id(site.owner), site.name), ())

    def transaction(self) -> AbstractContextManager[None]:
        return STATE.journal.transaction()

    def bind(self, patched: PatchedSite) -> None:
        site, replacement = patched.site, patched.replacement
        key = (id(site.owner), site.name)

        def forget() -> None:
            replacement.calls.deactivate()
            leave(replacement.function)
            STATE.patched[key].pop()  # the journal undoes the last one first
            if not STATE.patched[key]:
                del STATE.patched[key]

        STATE.journal.rebind(site.owner, site.name, replacement.function, on_undo=forget)
        STATE.patched.setdefault(key, []).append(patched)
        if replacement.participant is not None:
            enter(replacement.function, replacement.participant)
