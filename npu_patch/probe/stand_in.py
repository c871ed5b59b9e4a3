"""A `self` that is no module: what a method under probe is called on.

Nothing is constructed for a probe: no random number is drawn, no parameter is registered (DeepSpeed's `zero.Init` and
accelerate's `init_empty_weights` hook those), no weight is touched. A stand-in owns only the attributes that it was
given, takes methods from the class, and reports every other attribute that the method asks for.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any


class _Asked(threading.local):
    own: Mapping[str, Any] = {}
    names: set[str] | None = None

    def note(self, name: str, value: Any) -> None:
        if self.names is not None and self.own.get(name, value) is value:
            self.names.add(name)


_ASKED = _Asked()


@contextlib.contextmanager
def asked_for(own: Mapping[str, Any]) -> Iterator[set[str]]:
    """The names under which observed code asks stand-ins for what the instance has, its `own`, or could have. What a
    probe puts in place of that is the probe's."""
    before = _ASKED.own, _ASKED.names
    _ASKED.own, _ASKED.names = own, set()
    try:
        yield _ASKED.names
    finally:
        _ASKED.own, _ASKED.names = before


class Missing(BaseException):
    """The method under probe asked its stand-in for an attribute that it was not given.

    Not an `Exception`, so that a `getattr(self, name, default)` or a `try` in the original does not swallow it.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


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
        if name in _ASKED.own:
            _ASKED.note(name, value)
        return value

    def __getattr__(self, name: str) -> Any:
        cls, on_missing = vars(self)["_stand_in"]
        found = inspect.getattr_static(cls, name, None)
        if isinstance(found, (FunctionType, property, classmethod, staticmethod)):
            owner = cls if isinstance(found, classmethod) else self
            return found.__get__(owner, cls)
        _ASKED.note(name, found)
        if found is not None:
            return found
        if name.startswith("__"):
            raise AttributeError(name)
        if on_missing is None:
            raise Missing(name)
        value = on_missing(name)
        vars(self)[name] = value
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a stand-in is not a module")
