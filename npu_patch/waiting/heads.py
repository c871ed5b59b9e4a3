"""RMSNorms of q and k put off until their rotation, so that one kernel computes both.

While an attention layer's own forward runs inside `deferring(...)`, its two norms return `DeferredHeads`: what they
were given, and how it is to be normalized. Nothing but the rotation takes them, and where no kernel takes both, it has
them normalized first; whatever else looks at them raises `Abandoned`, and the layer runs anew without. So the forward
may do what it likes, its result is right.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from npu_patch.numerics.written import version_of
from npu_patch.ops.readings import NotRead, RMSNormReading, RoPEReading
from npu_patch.ops.rms_norm import RMSNormVariant
from npu_patch.serving.calls import Calls
from npu_patch.waiting.contract import Abandoned, Waiting, name_of


class DeferredHeads(Waiting):
    """q or k before its norm: x `[B, H, S, D]` or `[B, S, H, D]`, to be normalized over D; `transposed` since it was
    given. Not a tensor."""

    __slots__ = ("deferral", "eps", "norm", "transposed", "variant", "version", "weight", "x")

    def __init__(
        self,
        norm: torch.nn.Module,
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        variant: RMSNormVariant,
        deferral: Deferral,
        transposed: bool = False,
    ) -> None:
        self.norm, self.x, self.weight, self.eps, self.variant = norm, x, weight, eps, variant
        self.version, self.deferral, self.transposed = version_of(x), deferral, transposed

    @property
    def settled(self) -> bool:
        return self.deferral.over

    def peek(self) -> None:
        """It lasts for the call of its layer."""

    def materialise(self, used_by: str) -> NoReturn:
        self._abandon(f"q or k is used ({used_by}) between its norm and its rotation")

    def _abandon(self, reason: str) -> NoReturn:
        self.deferral.over = True
        raise Abandoned(reason)

    def transpose(self, first: int, second: int) -> DeferredHeads:
        """Of the dimensions 1 and 2, which no norm over the last one touches."""
        if {first, second} != {1, 2} or self.x.dim() != 4:
            self._abandon(f"q or k is transposed over {first} and {second} after its norm")
        self.check()
        x, transposed = self.x.transpose(1, 2), not self.transposed
        return DeferredHeads(self.norm, x, self.weight, self.eps, self.variant, self.deferral, transposed)

    def normalized(self) -> Tensor:
        """By the norm itself, in the layout that it was given."""
        with deferring(None):
            found: Tensor = self.norm(self.x.transpose(1, 2) if self.transposed else self.x)
        return found.transpose(1, 2) if self.transposed else found

    def check(self) -> None:
        """The norm is that of x as it was given."""
        if version_of(self.x) != self.version:
            self._abandon("what q or k was normalized from is changed in place before the rotation")

    def __getattr__(self, name: str) -> NoReturn:
        self.materialise(name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        heads = next(each for each in tree_leaves((args, kwargs)) if isinstance(each, DeferredHeads))
        heads._abandon(f"q or k goes through {name_of(function)} after its norm")


# The rotated q and k, or why they are normalized by themselves.
Rotate = Callable[[RoPEReading, DeferredHeads, DeferredHeads, Tensor, Tensor], "tuple[Tensor, Tensor] | str"]


@dataclass
class Deferral:
    """One call of an attention layer: the norms of q and k that are put off, and what rotates them then. `over`: they
    wait no longer. `why_not`: they were not rotated together, and each norm computed its own."""

    norms: tuple[torch.nn.Module, torch.nn.Module]
    rotate: Rotate
    deferred: list[torch.nn.Module] = field(default_factory=list)
    done: bool = False
    over: bool = False
    why_not: str | None = None

    def defer(
        self, norm: torch.nn.Module, x: Tensor, weight: Tensor | None, eps: float, variant: RMSNormVariant
    ) -> DeferredHeads | None:
        """Each norm once: a layer that asks twice is given the second answer itself."""
        if x.dim() != 4 or not any(norm is each for each in self.norms) or any(norm is each for each in self.deferred):
            return None
        self.deferred.append(norm)
        return DeferredHeads(norm, x, weight, eps, variant, self)

    @property
    def pending(self) -> bool:
        return bool(self.deferred) and not self.done


class _Current(threading.local):
    deferral: Deferral | None = None


_CURRENT = _Current()


def current() -> Deferral | None:
    """Of the attention layer that this thread is in."""
    return _CURRENT.deferral


@contextlib.contextmanager
def deferring(deferral: Deferral | None) -> Iterator[None]:
    outer = _CURRENT.deferral
    _CURRENT.deferral = deferral
    try:
        yield
    finally:
        _CURRENT.deferral = outer
        if deferral is not None:
            deferral.over = True


def rotate_deferred(
    reading: RoPEReading, tensors: Sequence[Any], cos: Any, sin: Any, dimension: int | None
) -> tuple[Tensor, Tensor] | None:
    """For the rotary function's replacement, with its tables as they were given; some of `tensors` are deferred. None
    where they are to be normalized first."""
    deferral = current()
    if deferral is None or len(tensors) != 2 or not all(isinstance(each, DeferredHeads) for each in tensors):
        raise Abandoned("one of q and k is rotated without the other")
    if reading.signature.sections or dimension != 1 or not (isinstance(cos, Tensor) and isinstance(sin, Tensor)):
        raise Abandoned("the tables are laid out in another way")
    q, k = tensors
    q.check()
    k.check()
    rotated = deferral.rotate(reading, q, k, cos, sin)
    if isinstance(rotated, str):
        deferral.over, deferral.why_not = True, rotated
        return None
    deferral.done = deferral.over = True
    return rotated


@dataclass(frozen=True)
class NormSite:
    """A norm's replacement that takes part: the forward that it stands for, and what each instance computes."""

    original: Callable[..., Any]
    reading_of: Callable[[torch.nn.Module], RMSNormReading | NotRead]
    calls: Calls


@dataclass(frozen=True)
class RoPESite:
    """A rotary function's replacement that takes part."""

    original: Callable[..., Any]
    reading: RoPEReading
    calls: Calls


Participant = NormSite | RoPESite
NORMS: WeakKeyDictionary[Callable[..., Any], NormSite] = WeakKeyDictionary()  # by what is called in their place
ROTATIONS: WeakKeyDictionary[Callable[..., Any], RoPESite] = WeakKeyDictionary()


def enter(function: Callable[..., Any], participant: Participant) -> None:
    """Patches that put norms off find `participant` where they find `function`."""
    if isinstance(participant, NormSite):
        NORMS[function] = participant
    else:
        ROTATIONS[function] = participant


def leave(function: Callable[..., Any]) -> None:
    NORMS.pop(function, None)
    ROTATIONS.pop(function, None)
