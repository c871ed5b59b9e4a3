"""Counts of a survey, by patch."""

from __future__ import annotations

from npu_patch.commands.coverage.survey import Family, Tally


def totals(found: list[Family]) -> dict[str, Tally]:
    """By patch, over all families, in the order of the catalogue."""
    from npu_patch.patches import CATALOGUE

    return {
        patch.name: sum((family.patches.get(patch.name, Tally()) for family in found), Tally()) for patch in CATALOGUE
    }


def cell(tally: Tally | None) -> str:
    """ "3" where all that was found is served, "3 of 4" where not."""
    if tally is None or not tally.found:
        return ""
    return str(tally.served) if tally.served == tally.found else f"{tally.served} of {tally.found}"
