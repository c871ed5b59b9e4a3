"""A residual add put off until the norm of its sum, so that one kernel computes both.

In a decoder layer, the token mixer returns a `DeferredBranch`: its result, which is there, and who takes it from there.
`residual + branch` is a `DeferredSum`, and the RMSNorm that is given one asks the kernel for the norm and the sum at
once. Whatever else is done with either gets the tensor that the original would have made: nothing runs twice. Where the
norm waits too (quantised_norms.py), it is made before the sum is handed out, which may be written to then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from npu_patch.ops.rms_norm import RMSNormVariant
from npu_patch.serving.implementation import is_plain
from npu_patch.waiting.contract import Waiting, materialised, name_of

# RMSNorm(x + residual) and x + residual, for (norm, variant, x, residual, weight, eps); or why not.
Fuse = Callable[[torch.nn.Module, RMSNormVariant, Tensor, Tensor, Tensor | None, float], tuple[Tensor, Tensor] | str]


@dataclass
class Addition:
    """Of one call of a token mixer: what computes the add and the norm, and who is told, once, why it does not."""

    fuse: Fuse
    not_fused: Callable[[str], None]
    settled: bool = False  # the branch is added, or used in another way

    def give_up(self, reason: str) -> None:
        if not self.settled:
            self.settled = True
            self.not_fused(reason)

    def after(self, first: Addition) -> Addition:
        """Where `first` is asked before, and told only of itself why it does not."""

        def fuse(*call: Any) -> tuple[Tensor, Tensor] | str:
            found = first.fuse(*call)
            if not isinstance(found, str):
                return found
            first.not_fused(found)
            return self.fuse(*call)

        return Addition(fuse, self.not_fused)


class Deferred(Waiting):
    """Not a tensor; whatever is done with it is done with the one that it stands for."""

    __slots__ = ("__weakref__",)

    def peek(self) -> Tensor:
        raise NotImplementedError

    def like(self) -> Tensor:
        """A tensor of its shape, dtype and device."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        return self.like().shape

    @property
    def dtype(self) -> torch.dtype:
        return self.like().dtype

    @property
    def device(self) -> torch.device:
        return self.like().device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.materialise(name), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in ADDITIONS and len(args) == 2 and not kwargs:
            first, second = args
            return first + second if isinstance(first, Deferred) else second.__radd__(first)
        # Not `Waiting`: a tensor that waits hears from torch what is done with it, and whether it is written to.
        args, kwargs = materialised((args, kwargs or {}), name_of(function), Deferred)
        return function(*args, **kwargs)

    def __repr__(self) -> str:
        """Of its tensor, which does not count as a use."""
        return repr(self.peek())

    def __add__(self, other: Any) -> Any:
        own = self.materialise("add")
        return own + (other if isinstance(other, DeferredBranch) else materialised(other, "add", Deferred))

    def __radd__(self, other: Any) -> Any:
        return other + self.materialise("add")


class DeferredBranch(Deferred):
    """What a token mixer returns, y `[..., D]`, before it is added to the residual stream."""

    __slots__ = ("_addition", "_y")

    def __init__(self, y: Tensor, addition: Addition) -> None:
        self._y, self._addition = y, addition

    @property
    def settled(self) -> bool:
        return self._addition.settled

    def materialise(self, used_by: str) -> Tensor:
        self._addition.give_up(f"the branch is used ({used_by}) before it is added")
        return self._y

    def like(self) -> Tensor:
        return self._y

    peek = like

    def offered_to(self, first: Addition) -> DeferredBranch:
        """The same, for another who asks before."""
        return DeferredBranch(self._y, self._addition.after(first))

    def __add__(self, other: Any) -> Any:
        if isinstance(other, DeferredSum) and other.settled:
            other = other.peek()
        if self.settled or not is_plain(other):
            return super().__add__(other)
        if (other.shape, other.dtype, other.device) != (self.shape, self.dtype, self.device):
            return super().__add__(other)
        self._addition.settled = True
        return DeferredSum(self._y, other, self._addition)

    __radd__ = __add__  # of one dtype, a sum is the same in either order


class DeferredSum(Deferred):
    """x + residual, both `[..., D]`, of one dtype and on one device; a tensor from its norm on."""

    __slots__ = ("_addition", "_norm", "_value")

    def __init__(self, x: Tensor, residual: Tensor, addition: Addition) -> None:
        self._addition = addition
        self._norm: ref[Any] | None = None  # where it waits
        self._value: tuple[Tensor, Tensor] | Tensor = x, residual  # or what became of them

    def normalized(
        self, norm: torch.nn.Module, variant: RMSNormVariant, weight: Tensor | None, eps: float
    ) -> Tensor | None:
        """Its RMSNorm, which is what `norm` computes, or None where that is not computed together with the sum."""
        if isinstance(self._value, Tensor):
            return None
        found = self._addition.fuse(norm, variant, *self._value, weight, eps)
        if isinstance(found, str):
            self._give_up(found)
            return None
        normed, self._value = found
        self._norm = ref(normed) if isinstance(normed, Waiting) else None
        return normed

    def like(self) -> Tensor:
        return self._value if isinstance(self._value, Tensor) else self._value[0]

    def materialise(self, used_by: str) -> Tensor:
        if not isinstance(self._value, Tensor):
            return self._give_up(f"the sum is used ({used_by}) before its norm")
        norm = None if self._norm is None else self._norm()
        if norm is not None:
            norm.materialise(f"{used_by} of its sum")
        return self._value

    @property
    def settled(self) -> bool:
        return isinstance(self._value, Tensor)

    def peek(self) -> Tensor:
        if isinstance(self._value, Tensor):
            return self._value
        x, residual = self._value
        return residual + x

    def _give_up(self, reason: str) -> Tensor:
        self._value = total = self.peek()
        self._addition.not_fused(reason)
        return total


# What `tensor + deferred` arrives as. Not `torch.add`: the probe observes operators only, and there serves no other.
ADDITIONS = frozenset((Tensor.add, Tensor.__add__, Tensor.__radd__))


def _operator(name: str) -> Callable[..., Any]:
    def operator(self: Deferred, *others: Any) -> Any:
        return getattr(self.materialise(name), name)(*materialised(others, name, Deferred))

    return operator


# Python looks operators up on the class, past `__getattr__`.
for _name in (
    *("sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod", "pow", "rpow"),
    *("matmul", "rmatmul", "divmod", "rdivmod", "lshift", "rlshift", "rshift", "rrshift"),
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "rand", "or", "ror", "xor", "rxor", "invert", "neg", "pos", "abs"),
    *("getitem", "setitem", "iter", "len", "contains", "bool", "int", "float", "complex", "index"),
    *("array", "reversed", "format", "reduce_ex", "deepcopy"),
):
    if hasattr(Tensor, f"__{_name}__"):
        setattr(Deferred, f"__{_name}__", _operator(f"__{_name}__"))
