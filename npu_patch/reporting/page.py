"""A report as one HTML page without scripts or references to anything else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from npu_patch.reporting.actions import with_action
from npu_patch.reporting.outcome import PATCHED, Outcomes
from npu_patch.reporting.rows import Row, rows
from npu_patch.reporting.text import headline

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1c2024; }
table { border-collapse: collapse; width: 100%; }
th { text-align: left; border-bottom: 2px solid #1c2024; position: sticky; top: 0; background: #fff; }
th, td { padding: .3rem .7rem; vertical-align: top; }
td { border-bottom: 1px solid #dde1e6; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
.what { color: #59636e; }
.patched, .prepared { background: #e6f4ea; }
.skipped { background: #fff8e1; }
.failed, .warning { background: #fde7e9; }
.note, .warning { padding: .3rem .7rem; }
"""


def page_of_report(report: Outcomes) -> str:
    messages = [f'<p class="note">{escape(note)}</p>' for note in report.remarks]
    messages += [f'<p class="warning">{escape(warning)}</p>' for warning in report.warnings]
    header = ("patch", "status", "sites", "layers", "ran", "fell through")
    return page("npu_patch", headline(report), [table(header, map(_cells, rows(report.outcomes))), *messages])


def page(title: str, summary: str, parts: list[str]) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p>{escape(summary)}</p>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def table(header: tuple[str, ...], rows_of_cells: Iterable[Iterable[str]]) -> str:
    """`rows_of_cells`: for each row its cells as ready HTML, `<td>` included."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "\n".join(f"<tr>{''.join(cells)}</tr>" for cells in rows_of_cells)
    return f"<table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"


def _cells(row: Row) -> list[str]:
    names = escape(", ".join(row.names))
    status = "never called" if row.never_called else row.status
    what = row.what if row.status == PATCHED else with_action(row.what)
    patched = row.status == PATCHED
    reasons = "".join(
        f'<br><span class="what">{count} x {escape(with_action(reason))}</span>'
        for reason, count in row.fell_through.most_common()
    )
    return [
        f"<td>{escape(row.patch)}</td>",
        f'<td class="{row.status}">{status}</td>',
        f'<td>{names}<br><span class="what">{escape(what)}</span></td>',
        f'<td class="number">{"" if row.layers is None else row.layers}</td>',
        f'<td class="number">{row.ran if patched else ""}</td>',
        f'<td class="number">{row.fell_through.total() if patched else ""}{reasons}</td>',
    ]
