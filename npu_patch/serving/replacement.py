"""What stands at a site: serves a call, or calls the original, and counts which."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.findings import Unobserved
from npu_patch.numerics.room import in_quiet_room
from npu_patch.serving.bypassed import Bypassed
from npu_patch.serving.calls import Calls


class Answer:
    """What `serve` returns in place of a result."""


@dataclass(frozen=True)
class Unserved(Answer):
    """Why a replacement lets this one call through to the original."""

    reason: str


@dataclass(frozen=True)
class Unfused(Answer):
    """A result that the replacement had to compute in the original's own way, because by then parts of it (modules
    with dropout, say) had already run; and why."""

    result: Any
    reason: str


@dataclass(frozen=True)
class TakenOver(Answer):
    """A result that is counted elsewhere: by another patch's replacement, further out, that asked for it, or by this
    one later, once it is known whether it is served."""

    result: Any


def replacement_for(
    original: Callable[..., Any],
    calls: Calls,
    serve: Callable[..., Any],
    named_after: Callable[..., Any] | None = None,
    *,
    bypassed: Bypassed | None = None,
) -> Callable[..., Any]:
    """A function with the original's name and signature that returns `serve(*args, **kwargs)`, or the original's
    result where `serve` returns `Unserved`, and counts which. `named_after` is the function inside a wrapped one.
    `bypassed`: the functions of others that the original finds and `serve` does not, if not those of its own code."""
    bypassed = Bypassed.by(named_after or original) if bypassed is None else bypassed

    @functools.wraps(named_after or original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not calls.active:
            return original(*args, **kwargs)
        # A count would be a guard to the compiler; and what a probe calls is nobody's step.
        if torch.compiler.is_compiling() or in_quiet_room():
            result = serve(*args, **kwargs)
        else:
            if calls.watch is not None and calls.watch(args, kwargs):
                return original(*args, **kwargs)
            reason = bypassed.why_not()
            if reason is not None:
                calls.fell_through[reason] += 1
                return original(*args, **kwargs)
            calls.ran += 1  # before: checkpointing's recomputation leaves a forward by an exception once it has enough
            try:
                result = serve(*args, **kwargs)
            except Unobserved as accident:
                result = Unserved(str(accident))
            if not isinstance(result, Answer):
                return result
            calls.ran -= 1
            if isinstance(result, (Unserved, Unfused)):
                calls.fell_through[result.reason] += 1
        if isinstance(result, Unserved):
            return original(*args, **kwargs)
        return result.result if isinstance(result, (Unfused, TakenOver)) else result

    return replacement


def are_tensors(values: Iterable[Any]) -> bool:
    return not [value for value in values if not isinstance(value, Tensor)]  # all() costs the host twice as much


def tensors_on(
    device_type: str, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[Tensor] | Unserved:
    """The arguments in the order of `names`, where all are tensors and the first of them is on such a device."""
    bound = bind(names, args, kwargs)
    if bound is None or not are_tensors(bound):
        return Unserved("arguments that are no tensors")
    if bound[0].device.type != device_type:
        return Unserved(f"input on {bound[0].device.type}")
    return bound


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any] | None:
    """The arguments in the order of `names`, None for one not given; None if they do not fit."""
    if len(args) == len(names) and not kwargs:
        return list(args)
    if len(args) > len(names):
        return None
    bound = [*args, *[None] * (len(names) - len(args))]
    for name, value in kwargs.items():
        if name not in names or names.index(name) < len(args):
            return None
        bound[names.index(name)] = value
    return bound
