"""The bar of a command that takes a while: how far it is, and how long it will take."""

from __future__ import annotations

import io

import pytest

from npu_patch.commands.console import terminal


def test_the_bar_shows_the_time_left_and_takes_parts_of_steps() -> None:
    rich = pytest.importorskip("rich.progress")
    bar = terminal._bar()
    assert any(isinstance(column, rich.TimeRemainingColumn) for column in bar.columns)
    bar.console.file = io.StringIO()
    steps = terminal.Steps("quantising", bar)
    steps.of(10.5)
    steps.done(2.5)
    steps.done()
    assert (bar.tasks[0].completed, bar.tasks[0].total) == (3.5, 10.5)


def test_nobody_watches() -> None:
    with terminal.steps("quantising", quiet=True) as steps:
        steps.of(1)
        steps.done(0.5)
