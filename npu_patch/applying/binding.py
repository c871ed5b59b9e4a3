"""Puts replacements where they belong, through the one journal of the process."""

from __future__ import annotations

from collections.abc import Callable

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import STATE
from npu_patch.waiting.heads import enter, leave

Bind = Callable[[PatchedSite], None]


def bind(patched: PatchedSite) -> None:
    site, replacement = patched.site, patched.replacement
    key = (id(site.owner), site.name)

    def forget() -> None:
        replacement.calls.deactivate()
        leave(replacement.function)
        STATE.patched[key].pop()  # the journal undoes the last one first
        if not STATE.patched[key]:
            del STATE.patched[key]

    STATE.journal.rebind(site.owner, site.name, replacement.function, forget, site.label)
    STATE.patched.setdefault(key, []).append(patched)
    if replacement.participant is not None:
        enter(replacement.function, replacement.participant)
