"""An op: one function of tensors, who computes it, and what may decide who."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from npu_patch.serving.implementation import Call, Implementation, Result


class Variant(Protocol):
    """One out of a family of functions, as data."""

    @property
    def name(self) -> str: ...


@dataclass(frozen=True)
class Op(Generic[Call, Result]):
    """Its implementations stand in order of preference; they, `key` and `exact` are called with the same arguments.

    `key(*call)`: what may decide who serves a call: sizes and dtypes, of meta tensors too. `exact(*call)`: the
    definition in plain torch, which rounds nothing on the way, for float64. `variants`: the functions that it may be.
    """

    name: str
    implementations: tuple[Implementation[Call, Result], ...]
    key: Callable[Call, Hashable]
    exact: Callable[Call, Result]
    variants: Sequence[Variant] = ()

    @property
    def device_types(self) -> tuple[str, ...]:
        """That an implementation serves."""
        return tuple(dict.fromkeys(name for each in self.implementations for name in each.device_types))

    def __post_init__(self) -> None:
        for what, named in (("implementations", self.implementations), ("variants", self.variants)):
            names = [each.name for each in named]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:  # reports, verdicts and tuning files tell them apart by their names
                raise ValueError(f"op {self.name!r}: two {what} are called {twice!r}")


def of_no_computation(name: str, way: str, device_types: tuple[str, ...]) -> Op[[Callable[[], Any]], Any]:
    """For what changes how a model's own steps are run, or what they keep: a step is called as it is."""
    return Op(
        name,
        (Implementation(way, device_types, lambda step: step(), lambda step: None),),
        lambda step: (),
        lambda step: step(),
    )
