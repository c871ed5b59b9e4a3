"""What logits that wait are made from, and their numbers once somebody looked: apart from the tensors that stand for
them, which autograd keeps and which know their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from npu_patch.numerics.written import version_of
from npu_patch.ops.head_products import Term
from npu_patch.waiting.before_steps import STEPS

ROWS = "hidden states"
MERGED = "merged_adapters"  # where peft's layers keep their names: a merge writes to `.data`, which has no version


class ReadTooLate(RuntimeError):
    """What logits are made of is not there any more."""


class Origin:
    """Of one call of the head: what the logits are made of, as it was then, and the numbers that were derived from
    them. `count` is told once who looked at any. `holders`: modules that may merge adapters into its weights."""

    def __init__(self, count: Callable[[str], None], holders: Iterable[Module] = ()) -> None:
        self.numbers: weakref.WeakSet[Numbers] = weakref.WeakSet()
        self.tensors: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self._count: Callable[[str], None] | None = count
        self._parts: list[tuple[str, Tensor, Any]] = []
        lists = [module.__dict__[MERGED] for each in holders for module in each.modules() if MERGED in module.__dict__]
        self._merged = [(names, tuple(names)) for names in lists]

    def product(self, term: Term) -> Numbers:
        for name, tensor in zip((ROWS, "weight", "bias"), term.tensors, strict=True):
            if tensor is not None:
                self._parts.append((name, tensor, _state(tensor)))
        if any(each.is_leaf and each.requires_grad for each in self.parameters):
            STEPS.watch_for(self)
        return Numbers(self, lambda: self._multiplied(term))

    @property
    def parameters(self) -> list[Tensor]:
        return [tensor for name, tensor, _ in self._parts if name != ROWS]

    def make(self, used_by: str) -> None:
        """What all others are derived from, where one of them is still there."""
        for each in list(self.numbers):
            if not each.parents:
                each.made(used_by)

    def settle(self, used_by: str) -> None:
        """Before something is written: what was copied from it has to be there."""
        for each in list(self.numbers):
            each.made(used_by)

    def looked_at(self, used_by: str) -> None:
        if self._count is not None:
            self._count(used_by)
            self._count = None

    def why_too_late(self) -> str | None:
        if any(tuple(names) != merged for names, merged in self._merged):
            return "adapters were merged into the weight, or taken out of it,"
        for name, tensor, (version, *where) in self._parts:
            if version_of(tensor) != version:
                return f"the {name} changed in place"
            if tensor.untyped_storage().size() == 0:
                return f"the memory of the {name} was given back"
            if _state(tensor)[1:] != where:
                return f"the {name} was moved, cast or given other numbers"
        return None

    def _multiplied(self, term: Term) -> Tensor:
        reason = self.why_too_late()
        if reason is not None:
            raise ReadTooLate(
                f"the logits are read for the first time after {reason} of which they are made: read them before, or "
                "have them made at once with TWINKLE_NPU_LOSS=0"
            )
        with torch.no_grad(), torch.autocast(term.rows.device.type, enabled=False):
            bias = None if term.bias is None else term.bias.detach()
            return F.linear(term.rows.detach(), term.weight.detach(), bias)


def _state(tensor: Tensor) -> list[Any]:
    """What `.data = ` and `model.to()` change without a new version."""
    return [version_of(tensor), tensor.dtype, tensor.device, tensor.shape, tensor.data_ptr()]


class Numbers:
    """Of one or more tensors that wait: made once, from those of their parents."""

    __slots__ = ("__weakref__", "_compute", "_made", "origin", "parents")

    def __init__(self, origin: Origin, compute: Callable[..., Tensor], parents: Sequence[Numbers] = ()) -> None:
        self.origin, self.parents = origin, tuple(parents)
        self._compute: Callable[..., Tensor] = compute
        self._made: Tensor | None = None
        origin.numbers.add(self)

    @property
    def settled(self) -> bool:
        return self._made is not None

    def made(self, used_by: str) -> Tensor:
        if self._made is None:
            self.origin.looked_at(used_by)
            self._made = self._compute(*(each.made(used_by) for each in self.parents))
            self.parents = ()
        return self._made

    def unnoticed(self) -> Tensor:
        """For one who looks on: made for now."""
        return self._compute(*(each.unnoticed() for each in self.parents)) if self._made is None else self._made
