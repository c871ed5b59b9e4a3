"""Where a decoder layer adds a branch to the residual stream and normalizes the sum, with nothing between.

The layer's own `__init__` and `forward` run on a layer whose modules only record that they were called, for every value
that its configuration might have, in several dtypes and lengths: as they are, and with what one module returns put off
until it is added and the sum until it is normalized. Both must return the same, and what is put off must not reach
another module or leave the layer: there it would be no tensor. A way through the layer that cannot be run was not
observed, and then nothing of the layer is served; but no layer goes a way on which it lacks an attribute that its
`__init__` sets on another, or raises an error of its own.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import CodeType, FrameType, FunctionType
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room, silent
from npu_patch.numerics.values import values
from npu_patch.ops.readings import NotRead
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.probe.recorded_layer import (
    ModuleClass,
    Recording,
    Trial,
    arguments,
    attributes_of,
    is_module_class,
    loggers,
    make,
)
from npu_patch.probe.recorded_layer import same as same_result
from npu_patch.probe.unknowns import NotKnown, Path, TooManyPaths, any_deferred, every_path
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import innermost
from npu_patch.waiting.sums import Addition, Deferred, DeferredBranch, DeferredSum

SHAPE = (5, 3, 12)  # nothing unpacks into so many
# A layer that is served in the first may go another way in the others.
STREAMS = (
    (SHAPE, torch.float32),
    (SHAPE, torch.bfloat16),
    (SHAPE, torch.float16),
    ((5, 1, 12), torch.float32),
)
MOST_RESULTS = 4  # of one module
IsNorm = Callable[[ModuleClass], bool]


@dataclass(frozen=True)
class AddRMSNormReading:
    """In the forward of `layer`, whose code is `code`: what the modules `mixers` return is added, and the modules
    `norms` are given the sum. All are names of attributes. `in_tuple`: the branch is the first of several results.
    `looked_up`: every name that the code looks up, with what the class has under it, or None."""

    layer: ModuleClass
    code: CodeType
    mixers: tuple[str, ...]
    norms: tuple[str, ...]
    in_tuple: bool
    looked_up: tuple[tuple[str, Any], ...]


def possible_mixers(layer: ModuleClass, is_norm: IsNorm) -> list[ModuleClass]:
    """Of its own file, that it makes beside a norm: seen from names, without running anything."""
    forward, init = innermost(layer.forward), innermost(layer.__init__)
    if not isinstance(forward, FunctionType) or not isinstance(init, FunctionType):
        return []
    made = map(init.__globals__.get, names_used(init))
    classes = [each for each in made if is_module_class(each)]
    own = [each for each in classes if each.__module__ == layer.__module__ and not is_norm(each)]
    return own if any(map(is_norm, classes)) else []


def read_add_rms_norm(layer: ModuleClass, is_norm: IsNorm) -> list[tuple[type, AddRMSNormReading | NotRead]]:
    """With the class of the mixer, of each whose result is added and normalized at least once. `is_norm` says of which
    classes a replacement takes part."""
    if not possible_mixers(layer, is_norm):
        return []
    functions = innermost(layer.forward), innermost(layer.__init__)
    with quiet_room(), silent(loggers(functions)):
        return list(_readings(layer, is_norm))


def _readings(layer: ModuleClass, is_norm: IsNorm) -> Iterator[tuple[type, AddRMSNormReading | NotRead]]:
    code = innermost(layer.forward).__code__
    refusal = _why_unobservable(code)
    seen: list[_Run] = []
    endless = None
    try:
        for given in (False, True):
            trial = Trial(layer, given, *STREAMS[0])
            for run in every_path(partial(_run, trial, is_norm)):
                seen.append(run)
                if run.endless:
                    raise TooManyPaths(run.failed)
    except TooManyPaths as error:
        endless = str(error)
    counts: dict[tuple[str, ModuleClass], set[int]] = {}  # of results
    for run in seen:
        for name, cls in run.recording.called.items():
            counts.setdefault((name, cls), set()).add(run.recording.results.get(name, 1))
    of_name: dict[str, set[int]] = {}
    for (name, _), results in counts.items():
        of_name.setdefault(name, set()).update(results)
    usual = {name: next(iter(results)) for name, results in of_name.items() if len(results) == 1}
    found: dict[ModuleClass, list[_Found]] = {}
    for (name, cls), results in counts.items():
        if is_norm(cls) or "forward" not in vars(cls) or cls.__module__ != layer.__module__:
            continue
        if endless is not None:
            yield cls, NotRead(f"in {layer.__name__}: {endless}")
            continue
        best = _found(layer, is_norm, name, cls, sorted(results), usual)
        if best is not None:
            found.setdefault(cls, []).append(best)
    looked_up = _looked_up(layer)
    for cls, of_class in found.items():
        reason = refusal or next(filter(None, (each.refusal for each in of_class)), None)
        if reason is not None:
            yield cls, NotRead(f"in {layer.__name__}: {reason}")
            continue
        for in_tuple in (False, True):
            alike = [each for each in of_class if (each.results > 1) == in_tuple]
            if alike:
                norms = tuple(dict.fromkeys(norm for each in alike for norm in each.norms))
                mixers = tuple(each.mixer for each in alike)
                yield cls, AddRMSNormReading(layer, code, mixers, norms, in_tuple, looked_up)


@dataclass
class _Found:
    """Of one mixer, which returns so many `results`: the norms that are given the sum; why it must not wait.
    `indexed`: it is asked for one of its results by number, which a tensor answers too."""

    mixer: str
    cls: ModuleClass
    results: int
    norms: dict[str, None] = field(default_factory=dict)
    refusal: str | None = None
    indexed: bool = False
    usual: dict[str, int] = field(default_factory=dict)  # results of the layer's modules, to try first


def _found(
    layer: ModuleClass,
    is_norm: IsNorm,
    mixer: str,
    cls: ModuleClass,
    results: list[int],
    usual: dict[str, int],
) -> _Found | None:
    """With as many `results` as it can have; refused if no other number does better. None if nothing is normed."""
    refused: _Found | None = None
    waiting = list(results)
    while waiting:
        found = _Found(mixer, cls, waiting.pop(0), usual=usual)
        for shape, dtype in STREAMS:
            _look(found, layer, is_norm, shape, dtype)
            if found.refusal is not None or not found.norms:
                break
        if found.norms and found.refusal is None:
            return found
        if found.norms:
            refused = refused or found
        if found.indexed and not waiting and found.results < MOST_RESULTS:
            waiting.append(found.results + 1)
    return refused


def _look(found: _Found, layer: ModuleClass, is_norm: IsNorm, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every way, until there is something to serve and a reason not to."""
    try:
        for given in (False, True):
            trial = Trial(layer, given, shape, dtype)
            for plain, deferred in every_path(partial(_pair, trial, is_norm, found)):
                if plain.endless or deferred.endless:
                    raise TooManyPaths(plain.failed or deferred.failed)
                if plain.impossible or plain.recording.called.get(found.mixer, found.cls) is not found.cls:
                    continue
                found.refusal = found.refusal or _difference(plain, deferred)
                found.indexed |= "(__getitem__)" in (deferred.misused or "")
                if deferred.norm is not None and deferred.misused is None:
                    found.norms[deferred.norm] = None
                if found.refusal is not None and found.norms:
                    return
    except TooManyPaths as error:
        found.refusal = found.refusal or str(error)


def _difference(plain: _Run, deferred: _Run) -> str | None:
    if plain.failed is not None:
        return f"not every way through it could be run: {plain.failed}"
    if deferred.failed is not None:
        return f"with the sum put off: {deferred.failed}"
    if not same_result(plain.seen, deferred.seen):
        return "with the sum put off it computes something else"
    return None


@dataclass
class _Run:
    """What was seen of one run of the layer's forward, along one path. `impossible`: a layer that goes it does not
    exist, or fails by itself. `endless`: it asks on and on. `seen`: results, the gradient of the stream, the stream."""

    mixer: str | None
    recording: Recording
    norm: str | None = None
    misused: str | None = None
    failed: str | None = None
    impossible: bool = False
    endless: bool = False
    born: list[ref[Deferred]] = field(default_factory=list)
    seen: Any = None


def _pair(trial: Trial, is_norm: IsNorm, found: _Found, path: Path) -> tuple[_Run, _Run]:
    """The same way as it is, and with the results of the mixer put off. On a way that takes another number of results,
    a mixer with this one is not met."""
    plain = _run(trial, is_norm, path, {found.mixer: found.results}, found.usual)
    if plain.failed is not None:
        other = _run(trial, is_norm, path)
        plain.impossible |= other.failed is None and other.recording.results.get(found.mixer, 1) != found.results
        return plain, plain
    return plain, _attempt(trial, is_norm, path, _Run(found.mixer, Recording(dict(plain.recording.results))))


def _run(
    trial: Trial,
    is_norm: IsNorm,
    path: Path,
    only: dict[str, int] | None = None,
    usual: dict[str, int] | None = None,
) -> _Run:
    """As it is. How many results each module has is tried out, from the `usual` number on, but for those in `only`; a
    run that fails with every number of them is the one that failed first."""
    fixed = only or {}
    results = {**(usual or {}), **fixed}
    first: _Run | None = None
    while True:
        run = _attempt(trial, is_norm, path, _Run(None, Recording(results)))
        last = run.recording.last
        if run.failed is None or run.impossible:
            return run
        first = first or run
        if path.refusal is not None or last is None or last in fixed or results.get(last, 1) >= MOST_RESULTS:
            return first
        results = {**results, last: results.get(last, 1) + 1}


def _attempt(trial: Trial, is_norm: IsNorm, path: Path, run: _Run) -> _Run:
    forward = innermost(trial.layer.forward)

    def answer(name: str, cls: ModuleClass, y: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_norm(cls) and len(args) == 1 and not kwargs and isinstance(args[0], DeferredSum):
            run.norm = run.norm or name
            _only_called_by(forward, path)
            # Whichever: `_fused` computes none.
            normed = args[0].normalized(torch.nn.Identity(), PLAIN_VARIANTS[0], None, 0.0)
            args = (args[0].materialise(name) if normed is None else normed,)
        path.take(f"{name}, a {cls.__name__}", args, kwargs)
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
        y = y + tensors[0] if tensors else y
        if name != run.mixer:
            return y
        return _Watched(y, Addition(_fused, lambda reason: setattr(run, "misused", reason)), run.born)

    made = None
    try:
        made = make(trial, path, run.recording, answer)
        leaf, given = arguments(trial, path)
        stream = next(iter(given.values()))
        output = forward(made, **given)
        if any_deferred(output) or any_deferred([value for _, value in attributes_of(made)]):
            raise path.refuse("what is put off leaves the layer")
        run.seen = [output, _gradient(output, leaf), stream.detach()]
        del output
    except NotKnown as error:
        run.failed = str(error)
    except TooManyPaths as error:
        run.failed, run.endless = path.refuse(str(error)).args[0], True
    except Exception as error:
        unless_accident(error)
        run.failed = error_text(error)
        init = innermost(trial.layer.__init__)
        lacks = error.name if isinstance(error, AttributeError) and made is not None and error.obj is made else None
        run.impossible = lacks in names_used(init) or _raised_itself(error, (forward, init))
    if run.failed is None and any(each() is not None for each in run.born):
        run.failed = "what is put off is kept somewhere"
    run.failed = path.refusal or run.failed
    return run


def _only_called_by(forward: FunctionType, path: Path) -> None:
    """The norm of what waits is called by code of the layer's own file: not from within `torch.utils.checkpoint`, which
    keeps what it is given to run the code again."""
    frame: FrameType | None = sys._getframe(3)  # past the answer and its recorder
    while frame is not None and frame.f_code is not forward.__code__:
        if frame.f_globals is not forward.__globals__:
            raise path.refuse(f"its norm is called by {frame.f_globals.get('__name__')}")
        frame = frame.f_back


def _raised_itself(error: Exception, functions: tuple[FunctionType, ...]) -> bool:
    """Whether the error comes from a `raise` in one of these, or from a variable that they did not set on this way:
    whatever the layer is, there it fails."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None or traceback.tb_frame.f_code not in [each.__code__ for each in functions]:
        return False
    code, last = traceback.tb_frame.f_code, traceback.tb_lasti
    raised = any(each.offset == last and each.opname == "RAISE_VARARGS" for each in dis.get_instructions(code))
    return raised or isinstance(error, UnboundLocalError)


class _Watched(DeferredBranch):
    """Whether anybody keeps it, or the sum with it, can be seen when the layer is through."""

    __slots__ = ("_born",)

    def __init__(self, y: Tensor, addition: Addition, born: list[ref[Deferred]]) -> None:
        super().__init__(y, addition)
        self._born = born
        born.append(ref(self))

    def __add__(self, other: Any) -> Any:
        found = super().__add__(other)
        if isinstance(found, Deferred):
            self._born.append(ref(found))
        return found

    __radd__ = __add__


def _fused(norm: Any, variant: Any, x: Tensor, residual: Tensor, weight: Any, eps: float) -> tuple[Tensor, Tensor]:
    total = residual + x
    return total, total


def _why_unobservable(code: CodeType) -> str | None:
    """What no run shows: keywords that the layer may be given are asked for by name."""
    for flag, what in ((inspect.CO_VARARGS, "*"), (inspect.CO_VARKEYWORDS, "**")):
        if code.co_flags & flag:
            after_positional = what == "**" and bool(code.co_flags & inspect.CO_VARARGS)
            name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + after_positional]
            if not _only_passed_on(code, name):
                return f"it looks into its {what}{name}"
    return None


def _only_passed_on(code: CodeType, name: str) -> bool:
    """Whether `name` is used in `f(..., *name)` or `f(..., **name)` alone."""
    if name in code.co_cellvars:
        return False
    instructions = list(dis.get_instructions(code))
    for each, following in itertools.pairwise(instructions):
        names = each.argval if isinstance(each.argval, tuple) else (each.argval,)
        if "_FAST" not in each.opname or name not in names:
            continue
        if names[-1] != name or following.opname not in ("DICT_MERGE", "LIST_EXTEND", "CALL_FUNCTION_EX"):
            return False
    return True


def _looked_up(layer: ModuleClass) -> tuple[tuple[str, Any], ...]:
    """By the layer's forward, and by the methods of its own that it calls."""
    found: dict[str, Any] = {}
    waiting = [innermost(layer.forward)]
    while waiting:
        for name in names_used(waiting.pop()) - found.keys():
            found[name] = getattr(layer, name, None)
            static = innermost(inspect.getattr_static(layer, name, None))
            inner = innermost(static.fget) if isinstance(static, property) else static
            if isinstance(inner, FunctionType) and name not in vars(torch.nn.Module):
                waiting.append(inner)
    return tuple(found.items())


def _gradient(output: Any, leaf: Tensor) -> Tensor | None:
    tensors = [each for each in _tensors_in(output) if each.requires_grad]
    seeds = [values(each.shape, 80 + index, each.dtype) for index, each in enumerate(tensors)]
    return torch.autograd.grad(tensors, leaf, seeds, allow_unused=True)[0] if tensors else None


def _tensors_in(output: Any) -> list[Tensor]:
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return [tensor for each in output for tensor in _tensors_in(each)]
    return [output] if isinstance(output, Tensor) else []
