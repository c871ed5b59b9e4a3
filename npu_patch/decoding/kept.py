"""What is kept of a model between calls of generate(): static caches, and steps that were captured over them.

Of each model a few, the least recently used one goes first; nothing of a model that is gone.
"""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch

from npu_patch.decoding import cache as caches
from npu_patch.decoding.graph import new_pool
from npu_patch.decoding.step import Step

MOST_CACHES, MOST_STEPS = 2, 4


@dataclass
class Lease:
    """A cache that is kept. `kind`: of the calls that it serves."""

    cache: Any
    kind: tuple[Any, ...]
    in_use: bool = False


@dataclass
class KeptStep:
    """`state`: of the model, as it was captured. `cache()` is None once a caller's own is gone."""

    step: Step
    state: Any
    cache: weakref.ref[Any]
    addresses: tuple[int, ...]
    why_not: str | None = None


@dataclass
class OfModel:
    leases: list[Lease] = field(default_factory=list)  # the one used last comes last
    steps: OrderedDict[Any, KeptStep] = field(default_factory=OrderedDict)

    def lease(self, config: Any, length: int, kind: tuple[Any, ...]) -> Lease | None:
        """A cache that nobody else uses, as if it were new; None where its like is in use."""
        found = [each for each in self.leases if each.kind == kind]
        if any(each.in_use for each in found):
            return None
        lease = next((each for each in found if caches.length_of(each.cache) >= length), None)
        self._drop([each for each in found if each is not lease])  # transformers asks for no shorter one again
        if lease is None:
            lease = Lease(caches.made(config, caches.bucket(length)), kind)
        else:
            self.leases.remove(lease)
            caches.start_over(lease.cache)
        idle = [each for each in self.leases if not each.in_use]
        self._drop(idle[: max(len(self.leases) + 1 - MOST_CACHES, 0)])
        self.leases.append(lease)
        lease.in_use = True
        return lease

    def step(self, key: tuple[Any, ...], state: Any, cache: Any) -> KeptStep:
        """Captured or not yet; one that no longer fits is gone."""
        key = (id(cache), *key)
        kept, addresses = self.steps.get(key), caches.addresses(cache)
        if kept is None or kept.cache() is not cache or kept.addresses != addresses or kept.state != state:
            self.steps = OrderedDict(
                (k, v) for k, v in self.steps.items() if v.cache() is not None and v.state == state
            )
            kept = KeptStep(Step(), state, weakref.ref(cache), addresses)
            self.steps[key] = kept
            while len(self.steps) > MOST_STEPS:
                self.steps.popitem(last=False)
        self.steps.move_to_end(key)
        return kept

    def _drop(self, leases: list[Lease]) -> None:
        self.leases = [each for each in self.leases if each not in leases]
        gone = [each.cache for each in leases]
        for key, kept in list(self.steps.items()):
            if any(kept.cache() is cache for cache in gone):
                del self.steps[key]


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

    def forget(self) -> None:
        self._models.clear()
        self._pools.clear()


KEPT = Kept()
