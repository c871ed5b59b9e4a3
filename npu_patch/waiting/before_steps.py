"""Before an optimizer changes a head, those of its logits that somebody keeps are made: afterwards they cannot be."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

USED_BY = "an optimizer's step, as somebody keeps them beyond it"


class Kept(Protocol):
    """`parameters` that it will need as they are now, until `make` was called."""

    @property
    def parameters(self) -> list[Tensor]: ...

    def make(self, used_by: str) -> None: ...


class _Steps:
    """Listens to all optimizers for as long as there is something to make."""

    def __init__(self) -> None:
        self._kept: dict[int, weakref.ref[Any]] = {}
        self._handle: Any = None

    def watch_for(self, kept: Kept) -> None:
        number = id(kept)
        self._kept[number] = weakref.ref(kept, lambda _: self._forget(number))
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._before)

    def _before(self, optimizer: Optimizer, *call: Any) -> None:
        changed = {id(each) for group in optimizer.param_groups for each in group["params"]}
        for number, reference in list(self._kept.items()):
            kept = reference()
            if kept is not None and not changed.isdisjoint(map(id, kept.parameters)):
                kept.make(USED_BY)
                self._forget(number)

    def _forget(self, number: int) -> None:
        self._kept.pop(number, None)
        if not self._kept and self._handle is not None:
            self._handle.remove()
            self._handle = None


STEPS = _Steps()
