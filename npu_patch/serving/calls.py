"""How often a replacement ran, and how often it fell through."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Calls:
    """How often a replacement ran, and how often it called the original instead, and why.

    `active` turns false when the site is restored: a reference to the replacement that somebody captured meanwhile
    (a hook's bound method, a `from ... import`) then behaves as the original.
    A replacement with several implementations counts in `ran_by` which one ran, and says in `declined` why another was
    passed over when it was last asked.
    `watch(args, kwargs)` is told of each call beforehand, if somebody wants to know; where it returns true, the
    original answers, and nothing is counted.
    """

    active: bool = True
    ran: int = 0
    tuned: int = 0  # calls whose shapes a tuning file decides on
    fell_through: Counter[str] = field(default_factory=Counter)
    ran_by: Counter[str] = field(default_factory=Counter)
    declined: dict[str, str] = field(default_factory=dict)
    watch: Callable[[tuple[Any, ...], dict[str, Any]], bool | None] | None = None

    def deactivate(self) -> None:
        self.active = False
