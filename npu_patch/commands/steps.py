"""The progress bar of a command that takes a while: nothing of it with --json, or where nobody watches."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any


class Steps:
    """`of(total)` says how many there are, as soon as that is known; `done()` that another one is."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def of(self, total: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def done(self) -> None:
        if self._bar is not None:
            self._bar.advance(self._task)


@contextlib.contextmanager
def steps(options: argparse.Namespace, what: str) -> Iterator[Steps]:
    if options.json:
        yield Steps()
        return
    from npu_patch.commands import terminal

    with terminal.progress(quiet=False) as bar:
        yield Steps(bar, bar.add_task(what, total=None))
