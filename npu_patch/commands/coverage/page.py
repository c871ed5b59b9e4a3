"""The matrix of families and patches as one HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from npu_patch.commands.coverage.survey import Family, Tally, cell, totals
from npu_patch.reporting.page import page, table


def page_of_families(found: list[Family], summary: str) -> str:
    patches = list(totals(found))

    def cells(family: Family) -> Iterable[str]:
        yield f"<td>{escape(family.name)}</td>"
        for name in patches:
            tally = family.patches.get(name)
            yield f'<td class="{_colour(tally)}">{cell(tally)}{_details(tally)}</td>'

    return page("npu_patch coverage", summary, [table(("family", *patches), map(cells, found))])


def _colour(tally: Tally | None) -> str:
    if tally is None or not tally.found:
        return ""
    if tally.failed:
        return "failed"
    return "patched" if tally.served == tally.found else "skipped"


def _details(tally: Tally | None) -> str:
    if tally is None:
        return ""
    lines = [*tally.variants, *tally.reasons]
    if tally.by_registry:
        lines.append("through transformers' registry")
    return "".join(f'<br><span class="what">{escape(line)}</span>' for line in lines)
