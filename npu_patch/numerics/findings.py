"""What was observed, for as long as anything is patched: `forget()` empties every memory, and restore() calls it.

A finding says what code computes. An accident (no memory, say) says nothing of it, and is never kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakSet

import torch

P = ParamSpec("P")
Found = TypeVar("Found")
ACCIDENTS = (MemoryError, torch.OutOfMemoryError, RecursionError, OSError)


class Unobserved(Exception):
    """Something outside the code that was to be observed kept it from being observed, this time."""


def unless_accident(error: BaseException) -> None:
    """For each `except` around observed code: what it raises is a finding, unless it is none of its doing."""
    if isinstance(error, Unobserved):
        raise error
    if isinstance(error, ACCIDENTS):
        raise Unobserved(f"not observed, for want of something else: {type(error).__name__}: {error}"[:160]) from error


class Findings(dict[Any, Any]):
    """A memory that `forget()` empties."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a memory, where dict has a value
    __eq__ = object.__eq__

    def __init__(self, *known: Any) -> None:
        super().__init__(*known)
        _EVERY.add(self)


_EVERY: WeakSet[Findings] = WeakSet()


def forget() -> None:
    for findings in list(_EVERY):
        findings.clear()


def remembered(observe: Callable[P, Found]) -> Callable[P, Found]:
    """`observe(...)` once for the same arguments; an accident is tried again."""
    findings = Findings()

    @functools.wraps(observe)
    def once(*args: P.args, **named: P.kwargs) -> Found:
        key = args, tuple(named.items())
        if key not in findings:
            findings[key] = observe(*args, **named)
        return cast(Found, findings[key])

    return once
