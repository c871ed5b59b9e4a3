"""Puts replacements where they belong, through the one journal of the process."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from types import ModuleType

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.applying.state import STATE
from npu_patch.sites.pickling import classes_that_keep, reduce_as_bound
from npu_patch.waiting.heads import enter, leave

Bind = Callable[[PatchedSite], None]


def bind(patched: PatchedSite) -> None:
    site, replacement = patched.site, patched.replacement
    key = (id(site.owner), site.name)

    def forget() -> None:
        replacement.calls.deactivate()
        if replacement.participant is not None:
            leave(replacement.function)
        STATE.patched[key].pop()  # the journal undoes the last one first
        if not STATE.patched[key]:
            del STATE.patched[key]

    STATE.journal.rebind(site.owner, site.name, replacement.function, forget, site.label)
    STATE.patched.setdefault(key, []).append(patched)
    if replacement.participant is not None:
        enter(replacement.function, replacement.participant)
    if isinstance(site.owner, ModuleType):
        for cls in classes_that_keep(site.original, site.owner):
            pickle_as_bound(cls)


def pickle_as_bound(cls: type) -> None:
    """Instances of the class keep a function whose name is bound anew."""
    if cls not in copyreg.dispatch_table:
        STATE.journal.rebind(copyreg.dispatch_table, cls, reduce_as_bound)
