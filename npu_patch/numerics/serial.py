"""A number for an object that no other object of the process ever has, unlike its id, and that keeps nothing alive."""

from __future__ import annotations

import itertools
import weakref
from types import MethodType
from typing import Any

_numbers = itertools.count(1)
_known: dict[int, tuple[weakref.ref[Any], int]] = {}


def serial(value: object) -> Any:
    """Of what takes no weak references (slots, numbers) the id. A bound method is new at each look: its parts count."""
    if isinstance(value, MethodType):
        return serial(value.__func__), serial(value.__self__)
    key = id(value)
    reference, number = _known.get(key, (None, 0))
    if reference is not None and reference() is value:
        return number
    try:
        reference = weakref.ref(value, lambda gone: _forget(key, gone))
    except TypeError:
        return -key
    _known[key] = reference, next(_numbers)
    return _known[key][1]


def _forget(key: int, gone: weakref.ref[Any]) -> None:
    if _known.get(key, (None, 0))[0] is gone:
        del _known[key]
