"""What a command hands back, and how it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


class CommandError(Exception):
    """The command cannot run as asked; the message names the thing, the value and what is accepted."""


def named(error: Exception) -> str:
    """Its type and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@dataclass(frozen=True)
class Result:
    """`content` is what `--json` prints, `shown()` gives what a person reads (strings and rich renderables), `fine`
    is the exit code."""

    content: Any
    shown: Callable[[], Iterable[Any]]
    fine: bool
