"""Which globals and attributes a function looks up, read from its code without running it."""

from __future__ import annotations

import contextlib
from types import CodeType, FunctionType
from typing import Any


def names_used(function: Any) -> set[str]:
    """Names of globals and attributes in the code of a function and of those that it wraps, with a trace or without."""
    names: set[str] = set()
    seen: list[Any] = []
    waiting = [function]
    while waiting:
        function = waiting.pop()
        if not isinstance(function, FunctionType) or any(function is known for known in seen):
            continue
        seen.append(function)
        names |= _names_in(function.__code__)
        for cell in function.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                waiting.append(cell.cell_contents)
    return names


def _names_in(code: CodeType) -> set[str]:
    """Comprehensions have a code of their own."""
    inner = (_names_in(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
