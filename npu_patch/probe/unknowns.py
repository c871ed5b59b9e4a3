"""Values that a probe does not know, such as those of a configuration, and every way that code can go for them.

`every_path(run)` runs `run(path)` again and again. Within a run, what is asked of an `Unknown` (is it true, is it 3?)
is answered the same way each time; over all runs, in every way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from npu_patch.deferred_sum import Deferred

MOST_PATHS = 64
T = TypeVar("T")


class TooManyPaths(Exception):
    """The code asks more than can be tried."""


class Path:
    """One way through the code: the answers so far, the first of them given."""

    def __init__(self, given: tuple[bool, ...] = ()) -> None:
        self.given = given
        self.answers: dict[str, bool] = {}  # by question, in the order in which they were asked first
        self._equal: dict[str, Any] = {}

    def answer(self, question: str) -> bool:
        if question not in self.answers:
            index = len(self.answers)
            self.answers[question] = self.given[index] if index < len(self.given) else True
        return self.answers[question]

    def is_equal(self, text: str, other: Any) -> bool:
        """What equals one thing equals no other."""
        if text in self._equal:
            return bool(self._equal[text] == other)
        equal = self.answer(f"{text} == {other!r}")
        if equal:
            self._equal[text] = other
        return equal


def every_path(run: Callable[[Path], T]) -> Iterator[T]:
    waiting: list[tuple[bool, ...]] = [()]
    for _ in range(MOST_PATHS):
        if not waiting:
            return
        path = Path(waiting.pop())
        yield run(path)
        answers = tuple(path.answers.values())
        waiting += [(*answers[:index], not answers[index]) for index in range(len(path.given), len(answers))]
    if waiting:
        raise TooManyPaths(f"more than {MOST_PATHS} ways through it")


class Unknown:
    """A value of which nothing is known but where it comes from. Beside a tensor it counts as 1."""

    def __init__(self, path: Path, text: str) -> None:
        vars(self).update(_path=path, _text=text)

    def __repr__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(self._path, f"{self._text}.{name}")

    def __getitem__(self, index: Any) -> Unknown:
        return Unknown(self._path, f"{self._text}[{index!r}]")

    def __call__(self, *args: Any, **kwargs: Any) -> Unknown:
        return Unknown(self._path, f"{self._text}({args!r}, {kwargs!r})")

    def __iter__(self) -> Iterator[Any]:
        raise TypeError(f"how many values {self._text} has is not known")

    def __bool__(self) -> bool:
        return self._path.answer(self._text)

    def __contains__(self, item: Any) -> bool:
        return self._path.answer(f"{item!r} in {self._text}")

    def __eq__(self, other: object) -> bool:
        return other is self or self._path.is_equal(self._text, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self._text)


def _comparison(sign: str) -> Callable[[Unknown, Any], bool]:
    return lambda self, other: self._path.answer(f"{self._text} {sign} {other!r}")


def _arithmetic(name: str) -> Callable[[Unknown, Any], Any]:
    def compute(self: Unknown, other: Any) -> Any:
        if isinstance(other, (Tensor, Deferred)):
            return getattr(operator, name)(other, 1)
        return Unknown(self._path, f"{name}({self._text}, {other!r})")

    return compute


for _name, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    setattr(Unknown, f"__{_name}__", _comparison(_sign))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Unknown, f"__{_name}__", _arithmetic(_name))
    setattr(Unknown, f"__r{_name}__", _arithmetic(_name))
