"""Options of a later `apply()` that do not reach the sites of an earlier one: a class has one replacement, and models
that were given before run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.patches.patch import AnyPatch
from npu_patch.switches import Switches

Kept = tuple[str, str]  # what is said of an option before and after the number of sites that keep it


def kept_at(held: PatchedSite, patch: AnyPatch, asked: Switches) -> Iterator[Kept]:
    """Of each option that is another now than when the site was patched."""
    names = [*patch.options, *([patch.optional] if any(each.optional for each in patch.op.implementations) else [])]
    for name in names:
        if held.switches[name] != asked[name]:
            yield (
                f"{patch.name}: {name} stays {held.switches[name]} at",
                f"of an earlier apply(), not {asked[name]} ({asked.sources[name]}); call restore() first",
            )


def in_words(kept: Counter[Kept]) -> list[str]:
    return [f"{before} {sites} site{'s' if sites > 1 else ''} {after}" for (before, after), sites in kept.items()]
