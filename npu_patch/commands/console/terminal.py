"""Tables and progress in a terminal: drawn by rich where it is installed, plain text where it is not."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH_OF_FILES = 120


@dataclass(frozen=True)
class Table:
    """Cells are plain text; a cell `("red", "text")` is coloured. Columns in `numbers` are set to the right."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    numbers: Sequence[str] = ()


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> Table:
    return Table(title, columns, list(rows), numbers)


def drawn(parts: Iterable[str | Table]) -> str:
    """Tables as wide as the terminal (COLUMNS says how wide it is, where it is set); other lines as they are."""
    return "\n".join(part if isinstance(part, str) else _table(part) for part in parts)


class Steps:
    """Of a command that takes a while: `of(total)` says how many there are, as soon as that is known, `done()` that
    another one is. `bar`: rich's, if there is one."""

    def __init__(self, what: str, bar: Any = None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task(what, total=None)

    def of(self, total: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def done(self, steps: float = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, steps)


@contextlib.contextmanager
def steps(what: str, quiet: bool) -> Iterator[Steps]:
    """With a bar on stderr, if it is not to be quiet and somebody watches."""
    bar = None if quiet or not sys.stderr.isatty() else _bar()
    with bar or contextlib.nullcontext():
        yield Steps(what, bar)


def _bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        return None
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), *times)
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _table(wanted: Table) -> str:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text
    except ImportError:
        return _plain(wanted)
    made = RichTable(title=wanted.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in wanted.columns:
        made.add_column(column, justify="right" if column in wanted.numbers else "left", overflow="fold")
    for row in wanted.rows:
        made.add_row(*(Text(_text(cell), style=cell[0] if isinstance(cell, tuple) else "") for cell in row))
    given = sys.stdout.isatty() or os.environ.get("COLUMNS", "").isdecimal()
    console = Console(width=None if given else WIDTH_OF_FILES, highlight=False)
    with console.capture() as captured:
        console.print(made)
    return captured.get().removesuffix("\n")


def _plain(wanted: Table) -> str:
    """Columns as wide as their widest cell, but for the last, which nothing follows."""
    cells = [[_text(cell) for cell in row] for row in (wanted.columns, *wanted.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if name in wanted.numbers else cell.ljust(width)
            for cell, width, name in zip(row, widths, wanted.columns, strict=True)
        ).rstrip()
        for row in cells
    ]
    rule = "  ".join("-" * width for width in (*widths[:-1], len(wanted.columns[-1])))
    return "\n".join([wanted.title, lines[0], rule, *lines[1:], ""]).lstrip("\n")


def _text(cell: Any) -> str:
    return str(cell[1] if isinstance(cell, tuple) else cell)
