"""The progress bar of a command that takes a while: nothing of it with --json, or where nobody watches."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import Any

from npu_patch.commands.console.terminal import progress


class Steps:
    """`of(total)` says how many there are, as soon as that is known; `done()` that another one is."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task = bar, task

    def of(self, total: int) -> None:
        self._bar.update(self._task, total=total)

    def done(self) -> None:
        self._bar.advance(self._task)


@contextlib.contextmanager
def steps(options: argparse.Namespace, what: str) -> Iterator[Steps]:
    with progress(quiet=options.json) as bar:
        yield Steps(bar, bar.add_task(what, total=None))
