"""Tables and progress in a terminal, through rich."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from npu_patch.commands.result import CommandError

if TYPE_CHECKING:
    from rich.progress import Progress
    from rich.table import Table

WIDTH_OF_FILES = 120


def show(parts: Iterable[Any]) -> None:
    """Prints strings and tables to stdout."""
    _rich()
    from rich.console import Console

    width = None if sys.stdout.isatty() else WIDTH_OF_FILES
    console = Console(width=width, highlight=False, soft_wrap=False)
    for part in parts:
        console.print(part, markup=not isinstance(part, str))


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], numbers: Sequence[str] = ()) -> Table:
    """Cells are plain text; a cell `("red", "text")` is coloured. Columns in `numbers` are set to the right."""
    _rich()
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        made.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell[1], style=cell[0]) if isinstance(cell, tuple) else Text(str(cell)) for cell in row))
    return made


def progress(quiet: bool) -> Progress:
    """On stderr, and only where somebody watches it."""
    _rich()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    return Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal)


def _rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise CommandError(
            f"the package rich, which draws its tables, cannot be imported ({error}): pip install 'npu_patch[cli]', or "
            "ask for --json"
        ) from error
