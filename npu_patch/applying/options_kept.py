"""Options of a later `apply()` that do not reach the sites of an earlier one: a class has one replacement, and models
that were given before run it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from npu_patch.applying.patched_site import PatchedSite
from npu_patch.patches.patch import AnyPatch
from npu_patch.switches import Switches, Value


@dataclass(frozen=True)
class Kept:
    """One option of a patch, as its replacements were made with it, and as it is asked for now."""

    patch: str
    name: str
    in_force: Value
    asked: Value
    source: str


def kept_at(held: PatchedSite, patch: AnyPatch, asked: Switches) -> Iterator[Kept]:
    """Each option that is another now than when the site was patched."""
    names = [*patch.options, *(["triton"] if any(each.optional for each in patch.op.implementations) else [])]
    for name in names:
        if held.switches[name] != asked[name]:
            yield Kept(patch.name, name, held.switches[name], asked[name], asked.sources[name])


def in_words(kept: Counter[Kept]) -> list[str]:
    return [
        f"{each.patch}: {each.name} stays {each.in_force} at {sites} site{'s' if sites > 1 else ''} of an earlier "
        f"apply(), not {each.asked} ({each.source}); call restore() first"
        for each, sites in kept.items()
    ]
