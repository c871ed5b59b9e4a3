"""A `self` that is no module: what a method under probe is called on.

Nothing is constructed for a probe: no random number is drawn, no parameter is registered (DeepSpeed's `zero.Init` and
accelerate's `init_empty_weights` hook those), no weight is touched. A stand-in owns only the attributes that it was
given, takes methods from the class, and reports every other attribute that the method asks for.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from types import FunctionType
from typing import Any

from npu_patch.numerics.error_text import error_text

LACKING = object()
# What the instance under observation has, and the names of it that were asked for.
_ASKED: ContextVar[tuple[Mapping[str, Any], set[str]] | None] = ContextVar("npu_patch asked for", default=None)


@contextlib.contextmanager
def asked_for(own: Mapping[str, Any]) -> Iterator[set[str]]:
    """The names under which observed code asks stand-ins for what the instance has, its `own`, or could have. What a
    probe puts in place of that is the probe's."""
    names: set[str] = set()
    token = _ASKED.set((own, names))
    try:
        yield names
    finally:
        _ASKED.reset(token)


def _note(name: str, value: Any) -> None:
    asked = _ASKED.get()
    if asked is not None and asked[0].get(name, LACKING) is value:
        asked[1].add(name)


class Missing(BaseException):
    """The method under probe asked its stand-in for an attribute that it was not given.

    Not an `Exception`, so that a `getattr(self, name, default)` or a `try` in the original does not swallow it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def problem_text(problem: BaseException) -> str:
    """Why a method could not be observed, for a reason."""
    return f"it asks for {problem.name!r}" if isinstance(problem, Missing) else error_text(problem)


class StandIn:
    """A `self` for a method of `cls` that has `attributes` and nothing else.

    `on_missing(name)` supplies an attribute that was not given; by default it raises `Missing`.
    """

    def __init__(
        self, cls: type, attributes: Mapping[str, Any], on_missing: Callable[[str], Any] | None = None
    ) -> None:
        vars(self).update(attributes)
        vars(self)["_stand_in"] = (cls, on_missing)

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        _note(name, value)
        return value

    def __getattr__(self, name: str) -> Any:
        cls, on_missing = vars(self)["_stand_in"]
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, (FunctionType, property, classmethod, staticmethod)):
            owner = cls if isinstance(found, classmethod) else self
            return found.__get__(owner, cls)
        _note(name, LACKING)
        if found is not None:
            return found
        if name.startswith("__"):
            raise AttributeError(name)
        if on_missing is None:
            raise Missing(name)
        value = on_missing(name)
        vars(self)[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        """What a forward keeps on its layer, somebody will look for there."""
        raise AttributeError(f"it keeps something under {name!r}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a stand-in is not a module")
