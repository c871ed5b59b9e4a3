"""Where a decoder layer adds a branch to the residual stream and normalizes the sum, with nothing between.

The layer's own `__init__` and `forward` run on a layer whose modules only record that they were called, for every value
that its configuration might have: as they are, and with what one module returns put off until it is added and the sum
until it is normalized. Both must return the same, and what is put off must not reach another module or leave the layer:
there it would be no tensor.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.deferred_sum import Addition, Deferred, DeferredBranch, DeferredSum
from npu_patch.names_used import names_used
from npu_patch.probe.room import quiet_room, values
from npu_patch.probe.tiny_attention import tensors_in
from npu_patch.probe.unknowns import Path, TooManyPaths, Unknown, every_path
from npu_patch.sites import innermost

SHAPE = (5, 3, 12)  # nothing unpacks into so many
MOST_RESULTS = 4  # of one module
IsNorm = Callable[[type], bool]


@dataclass(frozen=True)
class AddRMSNormReading:
    """In the forward of `layer`, whose code is `code`: what the modules `mixers` return is added, and the modules
    `norms` are given the sum. All are names of attributes. `in_tuple`: the branch is the first of several results."""

    layer: type
    code: CodeType
    mixer_class: type
    mixers: tuple[str, ...]
    norms: tuple[str, ...]
    in_tuple: bool


def read_add_rms_norm(layer: type, is_norm: IsNorm) -> list[AddRMSNormReading]:
    """By the class of the mixer; `is_norm` says of which classes a replacement takes part."""
    forward, init = innermost(layer.forward), innermost(layer.__init__)
    if not isinstance(forward, FunctionType) or not isinstance(init, FunctionType):
        return []
    made = [init.__globals__.get(name) for name in names_used(init)]
    classes = [each for each in made if _is_module_class(each)]
    own = [each for each in classes if each.__module__ == layer.__module__ and not is_norm(each)]
    if not own or not any(map(is_norm, classes)):
        return []
    with quiet_room():
        return list(_readings(layer, is_norm))


def _readings(layer: type, is_norm: IsNorm) -> Iterator[AddRMSNormReading]:
    try:
        plain = [
            found for given in (False, True) for found in every_path(lambda p, g=given: _run(layer, is_norm, p, g))
        ]
    except TooManyPaths:
        return
    called = {name: cls for found in plain if not found.failed for name, cls in found.called.items()}
    by_class: dict[type, list[tuple[str, tuple[str, ...], bool]]] = {}
    for name, cls in called.items():
        if is_norm(cls) or "forward" not in vars(cls) or cls.__module__ != layer.__module__:
            continue
        for results in range(1, MOST_RESULTS):
            norms = _norms_after(layer, is_norm, name, results)
            if norms:
                by_class.setdefault(cls, []).append((name, norms, results > 1))
                break
    for cls, found in by_class.items():
        for in_tuple in (False, True):
            same = [(name, norms) for name, norms, kind in found if kind == in_tuple]
            if same:
                norms = tuple(dict.fromkeys(norm for _, each in same for norm in each))
                code = innermost(layer.forward).__code__
                yield AddRMSNormReading(layer, code, cls, tuple(name for name, _ in same), norms, in_tuple)


def _norms_after(layer: type, is_norm: IsNorm, mixer: str, results: int) -> tuple[str, ...]:
    """The norms that are given the sum with what `mixer` returns; none if it could be used in an unsafe way."""
    norms: dict[str, None] = {}
    try:
        for given in (False, True):
            for plain, deferred in every_path(lambda path, g=given: _pair(layer, is_norm, path, g, mixer, results)):
                if plain.failed:
                    continue
                if deferred.failed or not _same((plain.output, plain.gradient), (deferred.output, deferred.gradient)):
                    return ()
                if deferred.norm is not None and deferred.misused is None:
                    norms[deferred.norm] = None
    except TooManyPaths:
        return ()
    return tuple(norms)


@dataclass
class _Run:
    """What was seen of one run of the layer's forward, along one path."""

    mixer: str | None = None
    results: dict[str, int] = field(default_factory=dict)  # how many each module returns
    called: dict[str, type] = field(default_factory=dict)
    last: str | None = None
    norm: str | None = None
    misused: str | None = None
    failed: str | None = None
    output: Any = None
    gradient: Tensor | None = None  # of the stream


def _pair(layer: type, is_norm: IsNorm, path: Path, given: bool, mixer: str, results: int) -> tuple[_Run, _Run]:
    """The same way as it is, and with the results of `mixer` put off."""
    plain = _run(layer, is_norm, path, given, only={mixer: results})
    return plain, plain if plain.failed else _run(layer, is_norm, path, given, dict(plain.results), mixer)


def _run(
    layer: type,
    is_norm: IsNorm,
    path: Path,
    given: bool,
    only: dict[str, int] | None = None,
    mixer: str | None = None,
) -> _Run:
    """How many results each module has is tried out, but for those in `only`."""
    fixed = dict(only or {})
    results = dict(fixed)
    while True:
        run = _Run(mixer, results)
        try:
            made = _make(layer, is_norm, path, run, given)
            arguments = _arguments(layer, path, given)
            run.output = innermost(layer.forward)(made, **arguments)
            if _any_deferred(run.output) or _any_deferred(vars(made)):
                raise _Leaves("the layer")
            run.gradient = _gradient(run.output, next(iter(arguments.values())))
            return run
        except Exception as error:
            run.failed = f"{type(error).__name__}: {error}"
        last = run.last
        if mixer is not None or last is None or last in fixed or results.get(last, 1) >= MOST_RESULTS:
            return run
        results = {**results, last: results.get(last, 1) + 1}


class _Leaves(Exception):
    """What was put off is given to a module that is no norm, or kept or returned by the layer."""


class _Recorder:
    """A module of the layer: `cls` is what it would be."""

    def __init__(self, cls: type, is_norm: IsNorm, run: _Run) -> None:
        self._cls, self._is_norm, self._run = cls, is_norm, run
        self._name = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run, name = self._run, self._name
        if not name:
            raise TypeError("a module that is no attribute of the layer")
        run.last = name
        run.called[name] = self._cls
        if self._is_norm(self._cls) and len(args) == 1 and not kwargs and isinstance(args[0], DeferredSum):
            normed = args[0].normalized(None, None, 0.0)
            run.norm = run.norm or name
            args = (args[0].tensor() if normed is None else normed,)
        if _any_deferred((args, kwargs)):
            raise _Leaves(name)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        y = values(SHAPE, zlib.crc32(name.encode()))
        y = y + tensors[0] if tensors else y
        if name == run.mixer:
            y = DeferredBranch(y, Addition(_fused, lambda reason: setattr(run, "misused", reason)))
        results = run.results.get(name, 1)
        return y if results == 1 else (y, *[None] * (results - 1))


def _fused(variant: Any, x: Tensor, residual: Tensor, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
    return residual + x, residual + x


def _make(layer: type, is_norm: IsNorm, path: Path, run: _Run, given: bool) -> torch.nn.Module:
    """`layer.__init__` on a new object, with recorders for modules and nothing known of its arguments; where `given`,
    nothing of flags and numbers either that it sets: they may be set anew."""
    init = innermost(layer.__init__)
    known = {name: init.__globals__[name] for name in names_used(init) if name in init.__globals__}
    namespace = {name: _recording(value, is_norm, run) for name, value in known.items()}
    namespace["__builtins__"] = init.__globals__.get("__builtins__", __builtins__)
    own = FunctionType(init.__code__, namespace, init.__name__, init.__defaults__, init.__closure__)
    own.__kwdefaults__ = init.__kwdefaults__
    made = object.__new__(layer)
    required = [
        parameter
        for parameter in list(inspect.signature(init).parameters.values())[1:]
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    own(made, **{parameter.name: Unknown(path, parameter.name) for parameter in required})
    for name, value in vars(made).items():
        if isinstance(value, _Recorder):
            value._name = name
        elif given and not name.startswith("_") and (value is None or type(value) in (bool, int, float, str)):
            vars(made)[name] = Unknown(path, f"self.{name}")
    return made


def _recording(value: Any, is_norm: IsNorm, run: _Run) -> Any:
    if _is_module_class(value):
        return lambda *args, **kwargs: _Recorder(value, is_norm, run)
    if value is torch or value is torch.nn:
        return _Namespace(value, is_norm, run)
    return value


class _Namespace:
    """torch, whose modules are recorded."""

    def __init__(self, module: ModuleType, is_norm: IsNorm, run: _Run) -> None:
        self._found = module, is_norm, run

    def __getattr__(self, name: str) -> Any:
        module, is_norm, run = self._found
        return _recording(getattr(module, name), is_norm, run)


def _arguments(layer: type, path: Path, given: bool) -> dict[str, Any]:
    """Of the layer's forward: the stream first, nothing known of what must be given, and the defaults of the rest;
    where `given`, something instead of None."""
    found: dict[str, Any] = {}
    for parameter in list(inspect.signature(innermost(layer.forward)).parameters.values())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        unknown = parameter.default is parameter.empty or isinstance(parameter.default, bool)
        if not found:
            found[parameter.name] = values(SHAPE, 70, grad=True)
        elif unknown or (given and parameter.default is None):
            found[parameter.name] = Unknown(path, parameter.name)
    return found


def _any_deferred(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return any(map(_any_deferred, value))
    if isinstance(value, dict):
        return any(map(_any_deferred, value.values()))
    return isinstance(value, Deferred)


def _gradient(output: Any, stream: Tensor) -> Tensor | None:
    tensors = [each for each in tensors_in(output) if each.requires_grad]
    seeds = [values(each.shape, 80 + index) for index, each in enumerate(tensors)]
    return torch.autograd.grad(tensors, stream, seeds, allow_unused=True)[0] if tensors else None


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (tuple, list)):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return (one is None) == (other is None)


def _is_module_class(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, torch.nn.Module)
