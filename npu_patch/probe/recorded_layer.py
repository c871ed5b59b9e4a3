"""A layer of a class, made without its arguments being known, whose modules only record that they were called.

Its own `__init__` runs on a new object, and its own `forward` on that: what they do with modules is seen, what they
compute between them is computed.
"""

from __future__ import annotations

import functools
import inspect
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any, TypeGuard

import torch
from torch import Tensor

from npu_patch.numerics.values import values
from npu_patch.probe.unknowns import Path, Unknown
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import innermost
from npu_patch.waiting.contract import Waiting

ModuleClass = type[torch.nn.Module]


@dataclass(frozen=True)
class Trial:
    """One way to run a layer. `given`: arguments that may be left out are there, and of flags and numbers that the
    layer's `__init__` sets nothing is known, for they may be set anew."""

    layer: ModuleClass
    given: bool
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass
class Recording:
    """Of one run: how many `results` each module returns, the class of each that was `called`, and the `last` one."""

    results: dict[str, int] = field(default_factory=dict)
    called: dict[str, ModuleClass] = field(default_factory=dict)
    last: str | None = None


# What a module (the name of its attribute, its class) returns first for a tensor and its arguments.
Answer = Callable[[str, ModuleClass, Tensor, tuple[Any, ...], dict[str, Any]], Any]


class Recorder:
    """A module of the layer: `isinstance` takes it for what it would be."""

    def __init__(self, cls: ModuleClass, trial: Trial, path: Path, recording: Recording, answer: Answer) -> None:
        vars(self).update(_cls=cls, _trial=trial, _path=path, _recording=recording, _answer=answer, _name="")

    @property  # type: ignore[misc]  # nobody sets it
    def __class__(self) -> type:
        return self._cls

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise self._path.refuse(f"{name} of {self._name or self._cls.__name__} is used")

    def __setattr__(self, name: str, value: Any) -> None:
        """As `__init__` does with a configuration; whoever asks for it gets it back."""
        self._path.take(f"{name} of {self._name}", value)
        vars(self)[name] = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name, trial, recording = self._name, self._trial, self._recording
        if not name:
            raise self._path.refuse(f"a {self._cls.__name__} that is no attribute of the layer is called")
        recording.last = name
        recording.called[name] = self._cls
        y = self._answer(name, self._cls, values(trial.shape, zlib.crc32(name.encode()), trial.dtype), args, kwargs)
        results = recording.results.get(name, 1)
        return y if results == 1 else (y, *[None] * (results - 1))


def make(trial: Trial, path: Path, recording: Recording, answer: Answer) -> torch.nn.Module:
    """`__init__` on a new object, with recorders for modules and nothing known of its arguments."""

    def recorded(value: Any) -> Any:
        if is_module_class(value):
            return lambda *args, **kwargs: Recorder(value, trial, path, recording, answer)
        return _Namespace(value, recorded) if value is torch or value is torch.nn else value

    init = innermost(trial.layer.__init__)
    known = {name: init.__globals__[name] for name in names_used(init) if name in init.__globals__}
    namespace = {name: recorded(value) for name, value in known.items()}
    namespace["__builtins__"] = init.__globals__.get("__builtins__", __builtins__)
    own = FunctionType(init.__code__, namespace, init.__name__, init.__defaults__, init.__closure__)
    own.__kwdefaults__ = init.__kwdefaults__
    made: torch.nn.Module = object.__new__(trial.layer)
    required = [
        parameter
        for parameter in _parameters(init)
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    own(made, **{parameter.name: Unknown(path, parameter.name) for parameter in required})
    modules = {name: value for name, value in attributes_of(made) if type(value) is Recorder}
    for name, value in modules.items():
        vars(value)["_name"] = name
    for name, value in list(vars(made).items()) if trial.given else ():
        if not name.startswith("_") and (value is None or type(value) in (bool, int, float, str)):
            vars(made)[name] = Unknown(path, f"self.{name}")
    return made


@functools.lru_cache(maxsize=8)
def _parameters(function: FunctionType) -> tuple[inspect.Parameter, ...]:
    """After `self`."""
    return tuple(inspect.signature(function).parameters.values())[1:]


def attributes_of(made: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """With what torch.nn.Module keeps apart."""
    yield from vars(made).items()
    yield from vars(made).get("_modules", {}).items()


class _Namespace:
    """torch, whose modules are recorded."""

    def __init__(self, module: ModuleType, recorded: Callable[[Any], Any]) -> None:
        self._found = module, recorded

    def __getattr__(self, name: str) -> Any:
        module, recorded = self._found
        return recorded(getattr(module, name))


def arguments(trial: Trial, path: Path) -> tuple[Tensor, dict[str, Any]]:
    """A leaf, and the arguments of the layer's forward: the stream first, which is made of the leaf and no leaf itself,
    nothing known of what must be given, and the defaults of the rest; where `given`, something instead of None."""
    leaf = values(trial.shape, 70, trial.dtype, grad=True)
    found: dict[str, Any] = {}
    for parameter in _parameters(innermost(trial.layer.forward)):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        unknown = parameter.default is parameter.empty or isinstance(parameter.default, bool)
        if not found:
            found[parameter.name] = leaf * 1
        elif unknown or (trial.given and parameter.default is None):
            found[parameter.name] = Unknown(path, parameter.name)
    return leaf, found


def loggers(functions: Sequence[FunctionType]) -> list[logging.Logger]:
    """That the modules of these functions log to."""
    return [value for each in functions for value in each.__globals__.values() if isinstance(value, logging.Logger)]


def is_module_class(value: Any) -> TypeGuard[ModuleClass]:
    return isinstance(value, type) and issubclass(value, torch.nn.Module)


def same(one: Any, other: Any) -> bool:
    """Whether two runs returned the same. What cannot be looked into is not."""
    if type(one) is not type(other) or isinstance(one, Waiting):
        return False
    if type(one) in (tuple, list):
        return len(one) == len(other) and all(map(same, one, other))
    if type(one) is dict:
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if type(one) is Unknown:
        return repr(one) == repr(other)
    return one is None or (type(one) in (bool, int, float, str) and one == other)
