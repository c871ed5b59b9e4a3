"""Operators that answer wrongly, as some releases of a vendor's do: for testing who notices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Wrong:
    name: str
    factor: float
    where: Callable[[Arguments], bool]
    given: Callable[[Arguments], Arguments]
    error: Exception | None


SIMULATED: set[str] = set()  # names of operators, noted where they are registered
_wrong: tuple[Wrong, ...] = ()


@contextmanager
def wrong_operator(
    name: str,
    *,
    factor: float = 1.0,
    where: Callable[[Arguments], bool] = lambda arguments: True,
    given: Callable[[Arguments], Arguments] = lambda arguments: arguments,
    error: Exception | None = None,
) -> Iterator[None]:
    """`torch.ops.npu.NAME` answers wrongly within the block, and its form for autograd, `_NAME`; its backward is an
    operator of its own.

    `factor`: what its floating-point results are multiplied by, NaN included. `given`: it computes from these arguments
    instead of those that it was given; both by the names of its schema, as CPU tensors over the same memory. `error`:
    it raises this. `where`: only in such calls. Blocks may nest.

    Raises:
        ValueError: for an operator that is not simulated.
    """
    global _wrong
    if name not in SIMULATED:
        raise ValueError(f"wrong_operator({name!r}): simulated are {', '.join(sorted(SIMULATED))}")
    one = Wrong(name, factor, where, given, error)
    _wrong = (*_wrong, one)
    try:
        yield
    finally:
        _wrong = tuple(each for each in _wrong if each is not one)


def is_any(name: str) -> bool:
    return any(each.name == name.removeprefix("_") for each in _wrong)


def spoiled(name: str, compute: Callable[[Arguments], Any], arguments: Arguments) -> Any:
    """The result of `compute(arguments)` as the wrong operators of this name have it."""
    factor = 1.0
    for each in _wrong:
        if each.name == name.removeprefix("_") and each.where(arguments):
            if each.error is not None:
                raise each.error
            arguments, factor = each.given(arguments), factor * each.factor
    result = compute(arguments)
    return result if factor == 1.0 else _times(result, factor)


def _times(value: Any, factor: float) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_times(each, factor) for each in value)
    is_number = hasattr(value, "is_floating_point") and value.is_floating_point()
    return value * factor if is_number else value
