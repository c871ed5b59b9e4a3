"""A report as plain text of at most 100 columns, for terminals and log files. Needs nothing but Python."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from npu_patch.reporting.actions import with_action
from npu_patch.reporting.outcome import NOTHING_APPLIED, PATCHED, Outcomes
from npu_patch.reporting.rows import Row, rows

WIDTH = 100
COLUMNS = (("patch", 16), ("what", 48), ("layers", 6), ("ran", 10), ("fell through", 12))
MOST_NAMES = 3
GAP = "  "


def text_of_report(report: Outcomes) -> str:
    lines = [*_wrapped(headline(report))]
    found = rows(report.outcomes)
    if found:
        lines += ["", _line([name for name, _ in COLUMNS]), _line(["-" * width for _, width in COLUMNS])]
        lines += [line for row, above in zip(found, [None, *found], strict=False) for line in _lines(row, above)]
        lines += [""] if report.notes or report.warnings else []
    lines += [line for note in report.remarks for line in _wrapped(f"note: {note}")]
    lines += [line for warning in report.warnings for line in _wrapped(f"WARNING: {warning}")]
    return "\n".join(lines)


def headline(report: Outcomes) -> str:
    """What became of everything, in one line."""
    if report.nothing_because == NOTHING_APPLIED:
        return f"npu_patch: {NOTHING_APPLIED}"
    if report.nothing_because is not None:
        return f"npu_patch on {report.device}: nothing was rebound: {report.nothing_because}"
    if not report.outcomes:
        return f"npu_patch on {report.device}: no site was found"
    counts = f"{len(report.patched)} patched, {len(report.skipped)} skipped, {len(report.failed)} failed"
    counts += f", {len(report.prepared)} prepared" if report.prepared else ""
    idle = sum(outcome.reached == 0 for outcome in report.patched)
    apart = f"; {idle} of the patched without a layer in this model" if idle else ""
    return f"npu_patch on {report.device}: {len(report.outcomes)} sites: {counts}{apart}"


def _lines(row: Row, above: Row | None) -> list[str]:
    """The row's numbers stand beside its names; what happened follows, indented."""
    patch = row.patch if above is None or above.patch != row.patch else ""
    width = COLUMNS[1][1]
    named = _named(row, width)
    fell = (f"; {count} fell through: {with_action(why)}" for why, count in row.fell_through.most_common())
    what = (row.what if row.status == PATCHED else with_action(row.what)) + "".join(fell)
    first, *more = textwrap.wrap(named, width, subsequent_indent="  ")
    numbers = ("-", "-")
    if row.status == PATCHED:
        numbers = (str(row.ran), str(row.fell_through.total()))
    lines = [_line([patch, first, "-" if row.layers is None else str(row.layers), *numbers])]
    lines += [_line(["", line]) for line in more]
    indent = " " * (COLUMNS[0][1] + len(GAP) + 2)
    return lines + textwrap.wrap(what, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _named(row: Row, width: int) -> str:
    """Of many names no more than one line has room for."""
    fate = "never called" if row.never_called else row.status
    before = "" if row.status == PATCHED and not row.never_called else f"{fate}: "
    names = row.names
    if len(names) <= MOST_NAMES:
        return before + ", ".join(names)
    some = [f"{before}{', '.join(names[:count])} and {len(names) - count} more" for count in range(MOST_NAMES, 0, -1)]
    return next((text for text in some if len(text) <= width), some[-1])


def _line(cells: Sequence[str]) -> str:
    """The first two to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if index < 2 else cell.rjust(width)
        for index, (cell, (_, width)) in enumerate(zip(cells, COLUMNS, strict=False))
    ]
    return GAP.join(padded).rstrip()


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")
