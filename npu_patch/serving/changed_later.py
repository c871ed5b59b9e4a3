"""Whether the code that calls a layer changes what it gave it in place afterwards: `h += mlp(norm(h))`.

Autograd then has not kept what the layer was given, unless the layer made a copy: transformers' norms do in half
precision, where they compute in float32; a fused operator does not. Without checkpointing the backward raises; under
checkpointing and other saved-tensor hooks nobody compares versions, and the gradient is wrong. So it must be known
before. What the callers do is read from their source, from the one that calls outwards, as long as what was given is
theirs too; each layer's callers once. Code without a source may do anything.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import CodeType, FrameType, FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from npu_patch.serving.in_place_flow import Effect, Later, Source, effect, source_of, what_becomes
from npu_patch.sites.sites import innermost, is_own

CALLS_OF_MODULES = (torch.nn.Module._call_impl.__code__, torch.nn.Module._wrapped_call_impl.__code__)
NO_MODELS = frozenset(("npu_patch", *sys.stdlib_module_names))
COMPUTE_ANEW = (torch.nn.Linear, torch.nn.Embedding, torch.nn.LayerNorm, torch.nn.modules.conv._ConvNd)
NOTHING: frozenset[int | str] = frozenset()
FIRST = frozenset[int | str]([0, "input"])  # what a layer of torch's is given
DEEPEST = 3  # of calls within calls that are looked into
Way = tuple[tuple[CodeType, int], ...]  # from the inside out, each frame's code, and which of its instructions calls
Ways = list[tuple[Way, "str | None"]]


@dataclass
class Callers:
    """Of the layers of one class, by layer and by the way that led to it, as far outwards as it was read: why what it
    is given must be kept, or None. Codes are held, for their ids are keys."""

    known: WeakKeyDictionary[torch.nn.Module, Ways] = field(default_factory=WeakKeyDictionary)
    of_others: Ways = field(default_factory=list)  # what passes for a layer
    sources: dict[int, tuple[CodeType, Source | None]] = field(default_factory=dict)
    effects: dict[Any, Effect | None] = field(default_factory=dict)
    _later: dict[Any, Later | None] = field(default_factory=dict)

    def why_changed_later(self, layer: Any, given: Iterable[Any], result: bool = False) -> str | None:
        """Of what is `given` to the call that two frames from here answer, or of its `result`. `layer`: whose call it
        is; its callers are always asked for the same."""
        frame = sys._getframe(2)
        ways = self.of_others
        if isinstance(layer, torch.nn.Module):
            known = self.known.get(layer)
            ways = self.known.setdefault(layer, []) if known is None else known
        for way, why in ways:
            if _leads(frame, way):
                return why
        why, last = self._read(frame, list(given), result)
        ways.append((_way(frame, last), why))
        return why

    def _read(
        self, frame: FrameType | None, given: Sequence[Any], returned: bool
    ) -> tuple[str | None, FrameType | None]:
        """Outwards: from call to call, as long as the caller has what is given, as an argument or as a result. With the
        last frame that was looked at, None for all of them."""
        closed_over: tuple[str, ...] = ()
        while True:
            between: list[FrameType] = []
            while frame is not None and not _is_caller(frame):
                between.append(frame)
                frame = frame.f_back
            if frame is None:
                return None, None
            self._source(frame.f_code)  # holds the code
            arguments = _arguments_with(between, given) if given else ()
            if arguments == () and not returned and not closed_over:
                return None, frame
            later = self._what_becomes(frame, arguments, closed_over, returned)
            if later is None:
                return f"what {_name(frame.f_code)} does with it afterwards cannot be read", frame
            if later.line is not None:
                return f"{_name(frame.f_code)} changes it in place afterwards, in line {later.line}", frame
            if not _is_in_module(frame):
                return None, frame  # the training script
            returned, closed_over = later.returned, frame.f_code.co_freevars
            frame = frame.f_back

    def _what_becomes(
        self,
        frame: FrameType,
        arguments: tuple[int | str, ...] | None,
        closed_over: tuple[str, ...],
        returned: bool,
    ) -> Later | None:
        """None where it cannot be read."""
        code, module = frame.f_code, module_of(frame)
        key = (id(code), frame.f_lasti, arguments, closed_over, returned, _kinds(module))
        if key not in self._later:
            source = self._source(code)
            effects = _Effects(self, frame.f_globals, module)
            found = (
                []
                if source is None
                else [
                    what_becomes(source, call, arguments, closed_over, returned, effects)
                    for call in source.calls_at(code, frame.f_lasti, frame.f_lineno)
                ]
            )
            lines = [each.line for each in found if each.line is not None]
            later = Later(lines[0] if lines else None, any(each.returned for each in found)) if found else None
            self._later[key] = later
        return self._later[key]

    def _source(self, code: CodeType) -> Source | None:
        if id(code) not in self.sources:
            self.sources[id(code)] = code, source_of(code)
        return self.sources[id(code)][1]


@dataclass(frozen=True)
class _Effects:
    """Of the functions and modules that code calls by name, where that is code of a model, and of torch's layers.
    `names`: the globals of the calling code, `module`: the one whose method it is."""

    callers: Callers
    names: dict[str, Any]
    module: torch.nn.Module | None
    depth: int = 0

    def __call__(self, called: ast.expr) -> Effect | None:
        found: Any = None
        if isinstance(called, ast.Name):
            found = self.names.get(called.id)
        elif isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id == "self":
            found = getattr(self.module, called.attr, None)
        if isinstance(found, torch.nn.ModuleList):
            return _joined(list({_kinds(each): self._of_module(each) for each in found}.values()))
        if isinstance(found, torch.nn.Module):
            return self._of_module(found)
        bound = hasattr(found, "__self__")
        return self._of(innermost(found), bound, self.module if bound else None) if callable(found) else None

    def _of_module(self, found: torch.nn.Module) -> Effect | None:
        if isinstance(found, COMPUTE_ANEW):
            return Effect(NOTHING, NOTHING)
        if getattr(found, "inplace", False) is True:
            return Effect(FIRST, FIRST)
        if isinstance(found, torch.nn.Sequential):
            return self._of_sequence(list(found))
        return self._of(innermost(type(found).forward), True, found)

    def _of_sequence(self, modules: Sequence[torch.nn.Module]) -> Effect:
        """What it is given goes on as long as a module may return it, as one of which nothing is known may."""
        changes = False
        for module in modules:
            effect = self._of_module(module) or Effect(NOTHING, frozenset([0]))
            changes = changes or 0 in effect.changes
            if 0 not in effect.returns:
                return Effect(FIRST if changes else NOTHING, NOTHING)
        return Effect(FIRST if changes else NOTHING, FIRST)

    def _of(self, function: Any, bound: bool, module: torch.nn.Module | None) -> Effect | None:
        if not isinstance(function, FunctionType) or self.depth == DEEPEST or not _is_own(function.__module__ or ""):
            return None
        key = (id(function.__code__), bound, _kinds(module), self.depth)
        if key not in self.callers.effects:
            source = self.callers._source(function.__code__)
            deeper = _Effects(self.callers, function.__globals__, module, self.depth + 1)
            self.callers.effects[key] = None if source is None else effect(source, bound, deeper)
        return self.callers.effects[key]


def _joined(effects: Sequence[Effect | None]) -> Effect | None:
    known = [each for each in effects if each is not None]
    if not known or len(known) < len(effects):
        return None
    changes = frozenset(key for each in known for key in each.changes)
    return Effect(changes, frozenset(key for each in known for key in each.returns))


def _kinds(module: torch.nn.Module | None) -> tuple[type, ...]:
    """What decides which code a module's code calls."""
    return () if module is None else (type(module), *map(type, module.children()))


def _way(frame: FrameType | None, last: FrameType | None) -> Way:
    way = []
    while frame is not None:
        way.append((frame.f_code, frame.f_lasti))
        frame = None if frame is last else frame.f_back
    return tuple(way)


def _leads(frame: FrameType | None, way: Way) -> bool:
    """Whether the frames from `frame` outwards are those of `way`, as far as that goes. Asked in every call of a layer:
    nothing is looked up."""
    for code, at in way:
        if frame is None or frame.f_code is not code or frame.f_lasti != at:
            return False
        frame = frame.f_back
    return True


def _is_caller(frame: FrameType) -> bool:
    """Code of a model, but for expressions with a frame of their own: they belong to the code around them."""
    name = frame.f_globals.get("__name__") or ""
    return frame.f_code not in CALLS_OF_MODULES and not frame.f_code.co_name.startswith("<") and _is_own(name)


@functools.cache
def _is_own(name: str) -> bool:
    """By the name of a module: asked in every call of a layer."""
    return is_own(name) and name.split(".", 1)[0] not in NO_MODELS


def _is_in_module(frame: FrameType) -> bool:
    """Whether a module's call led to this frame."""
    outer = frame.f_back
    while outer is not None and outer.f_code is not CALLS_OF_MODULES[0]:
        outer = outer.f_back
    return outer is not None


def _arguments_with(between: Sequence[FrameType], given: Sequence[Any]) -> tuple[int | str, ...] | None:
    """As which arguments a caller passed one of `given` to the module that `between` leads to, from the inside out;
    None for any: where it calls something else that calls the module."""
    calls = [frame for frame in between if frame.f_code in CALLS_OF_MODULES]
    if not calls:
        return None
    values = calls[-1].f_locals  # which the call keeps anyway
    passed = [*enumerate(values.get("args", ())), *values.get("kwargs", {}).items()]
    found = tuple(key for key, value in passed if _holds(value, given))
    return found if between[-1] is calls[-1] or not found else None


def _holds(value: Any, given: Sequence[Any]) -> bool:
    if any(value is each for each in given):
        return True
    if isinstance(value, Tensor):
        share = torch._C._is_alias_of  # type: ignore[attr-defined]  # torch's stub lacks it
        return any(isinstance(each, Tensor) and share(value, each) for each in given)
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return False
    return any(_holds(each, given) for each in value)


def module_of(frame: FrameType) -> torch.nn.Module | None:
    """Whose forward `frame` is. The call of the module is asked: a frame keeps what it is asked for to its end."""
    outer = frame.f_back
    while outer is not None and outer.f_code not in (CALLS_OF_MODULES[0], frame.f_code):
        outer = outer.f_back
    if outer is None or outer.f_code is frame.f_code:
        return None
    module: Any = outer.f_locals.get("self")
    return module if innermost(type(module).forward).__code__ is frame.f_code else None


def _name(code: CodeType) -> str:
    return getattr(code, "co_qualname", code.co_name)
