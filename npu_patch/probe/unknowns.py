"""Values that a probe does not know, such as those of a configuration, and every way that code can go for them.

`every_path(run)` runs `run(path)` again and again. Within a run, what is asked of an `Unknown` (is it true, is it 3?)
is answered the same way each time; over all runs, in every way. What cannot be answered so (how long is it?) ends the
run, and so does handing something put off to what is not known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import Tensor

from npu_patch.waiting.contract import Waiting

MOST_PATHS = 64
MOST_QUESTIONS = 2000  # in all runs along one path: `while not cache.done` asks for ever
T = TypeVar("T")


class TooManyPaths(BaseException):
    """The code asks more than can be tried. No `except Exception` of that code catches it."""


class NotKnown(BaseException):
    """The code wants to know more of an `Unknown` than yes or no, or hands it what must not leave the code."""


class Path:
    """One way through the code: the answers so far, the first of them given."""

    def __init__(self, given: tuple[bool, ...] = ()) -> None:
        self.given = given
        self.answers: dict[str, bool] = {}  # by question, in the order in which they were asked first
        self._equal: dict[str, Any] = {}
        self._asked = 0
        self.refusal: str | None = None  # kept, for code that catches everything

    def refuse(self, reason: str) -> NotKnown:
        self.refusal = self.refusal or reason
        return NotKnown(reason)

    def take(self, text: str, *given: Any) -> None:
        """`text` is handed what is `given`."""
        if any_deferred(given):
            raise self.refuse(f"what is put off is given to {text}")

    def answer(self, question: str) -> bool:
        self._asked += 1
        if self._asked > MOST_QUESTIONS:
            raise TooManyPaths(f"it asks more than {MOST_QUESTIONS} questions")
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


def any_deferred(value: Any) -> bool:
    """Whether `value` is, or contains, something that is put off."""
    if isinstance(value, (tuple, list, set)):
        return any(map(any_deferred, value))
    if isinstance(value, dict):
        return any(map(any_deferred, value.values()))
    return isinstance(value, Waiting)


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

    _path: Path
    _text: str

    def __init__(self, path: Path, text: str) -> None:
        vars(self).update(_path=path, _text=text)

    def __repr__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Unknown:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unknown(self._path, f"{self._text}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        self._path.take(f"{self._text}.{name}", value)

    def __getitem__(self, index: Any) -> Unknown:
        self._path.take(self._text, index)
        return Unknown(self._path, f"{self._text}[{index!r}]")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._path.take(self._text, index, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Unknown:
        self._path.take(self._text, args, kwargs)
        return Unknown(self._path, f"{self._text}({args!r}, {kwargs!r})")

    def __bool__(self) -> bool:
        return self._path.answer(self._text)

    def __contains__(self, item: Any) -> bool:
        self._path.take(self._text, item)
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
        if isinstance(other, (Tensor, Waiting)):
            return getattr(operator, name)(other, 1)
        self._path.take(self._text, other)
        return Unknown(self._path, f"{name}({self._text}, {other!r})")

    return compute


def _unanswerable(name: str) -> Callable[[Unknown], Any]:
    def ask(self: Unknown) -> Any:
        raise self._path.refuse(f"{name} of {self._text} is not known")

    return ask


for _name in ("iter", "len", "index", "int", "float"):
    setattr(Unknown, f"__{_name}__", _unanswerable(_name))
for _name, _sign in (("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    setattr(Unknown, f"__{_name}__", _comparison(_sign))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(Unknown, f"__{_name}__", _arithmetic(_name))
    setattr(Unknown, f"__r{_name}__", _arithmetic(_name))
