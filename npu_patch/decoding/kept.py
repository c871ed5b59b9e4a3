"""What is kept of a model between calls of generate(): static caches, and steps that were captured over them.

Of each model a few, the least recently used one goes first; nothing of a model that is gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npu_patch.decoding import cache as caches
from npu_patch.decoding.graph import new_pool
from npu_patch.decoding.host_state import Observed
from npu_patch.decoding.step import InputsOf, Run, Step, prove

MOST_CACHES, MOST_STEPS = 4, 8  # of steps, of checks of drafts, and of who drafts


@dataclass(eq=False)
class Lease:
    """A cache that is kept. `kind`: of the calls that it serves."""

    cache: Any
    kind: tuple[Any, ...]
    in_use: bool = False


@dataclass(eq=False)
class KeptStep:
    """`observed`: the model, as it was captured. `cache()` is None once a caller's own is gone."""

    step: Step
    key: tuple[Any, ...]
    observed: Observed
    cache: weakref.ref[Any]
    addresses: tuple[int, ...]
    why_not: str | None = None

    def prove(
        self, run: Run, tokens: Tensor, kwargs: Mapping[str, Any], inputs_of: InputsOf, now: Callable[[], Observed]
    ) -> tuple[Any, str | None]:
        """See `prove` of step.py. `now()`: the model as the host knows it then."""

        def changed() -> bool:
            return self.observed.changes_to(now())

        outputs, reason = prove(self.step, run, tokens, kwargs, inputs_of, changed, KEPT.pool(tokens.device.type))
        if reason is not None:
            self.why_not, self.step = reason, Step()
        return outputs, reason


@dataclass(eq=False)
class OfModel:
    """Those used last come last. `refused`: by kinds of calls, the state of the model, and why none was captured."""

    leases: list[Lease] = field(default_factory=list)
    steps: list[KeptStep] = field(default_factory=list)
    refused: dict[tuple[Any, ...], tuple[Any, str]] = field(default_factory=dict)

    def why_not(self, kind: tuple[Any, ...], observed: Observed) -> str | None:
        state, reason = self.refused.get(kind, (None, None))
        return reason if state == observed.state else None

    def refuse(self, lease: Lease, observed: Observed, reason: str) -> None:
        """The cache served nothing."""
        if len(self.refused) >= MOST_STEPS:
            self.refused.clear()
        self.refused[lease.kind] = observed.state, reason
        self._drop([lease])

    def lease(self, length: int, kind: tuple[Any, ...], make: Callable[[int], Any]) -> Lease | str:
        """A cache that nobody else uses, as if it were new; or why there is none. `make(length)` makes one."""
        found = [each for each in self.leases if each.kind == kind]
        if any(each.in_use for each in found):
            return "its cache is in use by another call of generate()"
        lease = next((each for each in found if caches.length_of(each.cache) >= length), None)
        if lease is None:
            made = make(caches.bucket(length))
            if isinstance(made, str):
                return made
            lease = Lease(made, kind)
        else:
            caches.start_over(lease.cache)
        self._drop(found if lease not in found else [])  # transformers asks for no shorter one again
        self.leases = [*(each for each in self.leases if each is not lease), lease]
        lease.in_use = True
        self._drop([each for each in self.leases if not each.in_use][: max(len(self.leases) - MOST_CACHES, 0)])
        return lease

    def step(self, key: tuple[Any, ...], observed: Observed, cache: Any) -> KeptStep:
        """Captured, or to be."""
        addresses = caches.addresses(cache)
        self.steps = [each for each in self.steps if each.cache() is not None]
        for kept in self.steps:
            fits = kept.cache() is cache and kept.key == key and kept.addresses == addresses
            if fits and kept.observed.state == observed.state:
                self.steps.remove(kept)
                break
        else:
            kept = KeptStep(Step(), key, observed, weakref.ref(cache), addresses)
        self.steps = [*self.steps, kept][-MOST_STEPS:]
        return kept

    def _drop(self, leases: list[Lease]) -> None:
        self.leases = [each for each in self.leases if not any(each is gone for gone in leases)]
        self.steps = [each for each in self.steps if not any(each.cache() is gone.cache for gone in leases)]


class Kept:
    """All of it, with the one pool of memory that graphs of a device share."""

    def __init__(self) -> None:
        self._models: weakref.WeakKeyDictionary[torch.nn.Module, OfModel] = weakref.WeakKeyDictionary()
        self._pools: dict[str, Any] = {}

    def of(self, model: torch.nn.Module) -> OfModel:
        return self._models.setdefault(model, OfModel())

    def pool(self, device_type: str) -> Any:
        if device_type not in self._pools:
            self._pools[device_type] = new_pool(device_type)
        return self._pools[device_type]

    def forget(self, model: torch.nn.Module | None = None) -> None:
        """Of a model, with the parts and wrappers of it that generated; or everything."""
        own = None if model is None else {id(each) for each in model.modules()}
        for other in list(self._models):
            if own is None or id(other) in own or any(each is model for each in other.modules()):
                del self._models[other]
        if not self._models:
            self._pools.clear()


KEPT = Kept()


def free_decoding(model: torch.nn.Module | None = None) -> None:
    """Frees the caches and graphs that generate() keeps for its next call: of a model, or of all. What it freed is the
    allocator's again, for a training step, say; the next call captures anew."""
    KEPT.forget(model)
