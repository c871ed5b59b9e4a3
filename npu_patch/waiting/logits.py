"""Logits that are known by what they are made of, and are made only if somebody looks at them.

The head of a language model returns `WaitingLogits`: hidden states and weights. The loss takes those, chunk by chunk.
What models do on the way to it (a scale, a soft cap, a cast, a slice of the tokens) is followed. For anybody else they
are the very tensor that the original would have made, with its gradient: the first look makes it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from npu_patch.numerics.written import version_of
from npu_patch.ops.chunked_loss import StandIn
from npu_patch.ops.head_products import Cast, Logits, Scaled, Tanh, Term
from npu_patch.ops.log_normalizers import log_normalizers
from npu_patch.waiting.contract import AskedAlone, Waiting
from npu_patch.waiting.origins import Numbers, Origin

aten = torch.ops.aten
Change = Callable[[Tensor], Tensor]
QUIET = ("torch", "npu_patch")  # packages that look on somebody else's behalf


class WaitingLogits(AskedAlone, torch.Tensor, Waiting):
    """`[..., V]`. Autograd knows it as what it stands for: its gradient goes on to the head's inputs."""

    _logits: Logits
    _changes: tuple[Change, ...]  # of the rows of those
    _numbers: Numbers
    _written: bool

    @staticmethod
    def __new__(cls, like: Tensor, logits: Logits, changes: tuple[Change, ...], numbers: Numbers) -> Any:
        """`like`: a meta tensor of its shape, strides and dtype."""
        waiting = torch.Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=logits.device
        )
        waiting._logits, waiting._changes, waiting._numbers, waiting._written = logits, changes, numbers, False
        numbers.origin.tensors.add(waiting)
        return waiting

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to do
    __hash__ = torch.Tensor.__hash__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        followed = FOLLOWED[func](func, args, kwargs) if func in FOLLOWED else None
        if followed is not None:
            return followed
        parts = func.decompose(*args, **kwargs)  # in inference_mode, torch has not done that by now
        if parts is not NotImplemented:
            return parts
        used_by = f"{func.overloadpacket.__name__} in {_reader()}"
        waiting = [each for each in tree_iter((args, kwargs)) if isinstance(each, WaitingLogits)]
        writes = func._schema.is_mutable
        if writes or any(each.alias_info is not None for each in func._schema.returns):
            for each in waiting:
                each._numbers.origin.settle(used_by)
                each._written = each._written or writes
        plain_args, plain_kwargs = tree_map_only(
            WaitingLogits, lambda each: each.materialise(used_by), (tuple(args), kwargs)
        )
        result = func(*plain_args, **plain_kwargs)
        return next((each for each in waiting if result is each.materialise(used_by)), result)  # written in place

    @property
    def settled(self) -> bool:
        """Whether they were made."""
        return self._numbers.settled

    def peek(self) -> Tensor:
        if self.settled:
            return self._numbers.unnoticed()
        apart = Numbers(Origin(lambda used_by: None), self._numbers.unnoticed)
        seen: Tensor = WaitingLogits(_like(self), self._logits.detached(), self._changes, apart)
        return seen

    def materialise(self, used_by: str) -> Tensor:
        return self._numbers.made(used_by)

    def taken(self) -> Logits | str:
        """What they are made of, with gradients where they have one; or why they have to be looked at."""
        if self._written or version_of(self) not in (0, None):
            return "the logits are changed in place"
        reason = self._numbers.origin.why_too_late()
        if reason is not None:
            return reason
        logits = self._logits if self.requires_grad else self._logits.detached()
        for change in self._changes:
            logits = logits.with_rows(change)
        return logits

    def heard(self) -> bool:
        """Whether somebody listens to a gradient, theirs or that of what was derived from them, but for a wrapper of
        the model that waits for any."""
        return any(each.retains_grad or _listeners(each) for each in self._numbers.origin.tensors)

    def _alone(self, used_by: str) -> Tensor:
        """Their tensor without what it was computed by, for those whom torch tells nothing of a subclass."""
        return self.materialise(f"{used_by} in {_reader()}").detach().requires_grad_(self.requires_grad)

    def logsumexp(self, dim: Any, keepdim: bool = False) -> Tensor:
        """Over the vocabulary, as of a z-loss, it makes none. Autograd's own derivative, below this, looks at them."""
        made_of = self.taken() if _waits(self) and dim in (-1, self.dim() - 1) else "not over the vocabulary"
        if isinstance(made_of, str) or torch.compiler.is_compiling():
            return super().logsumexp(dim, keepdim)
        dtype = self.dtype
        if torch.is_autocast_enabled(self.device.type):  # each device has its own list of what is computed in float32
            dtype = torch.zeros(1, dtype=dtype, device=self.device).logsumexp(0).dtype
        found = log_normalizers(made_of, StandIn(self, self.heard)).to(dtype)
        return found.unsqueeze(-1) if keepdim else found

    def __deepcopy__(self, memo: Any) -> Any:
        """Torch refuses to copy what is no leaf, in words of its own."""
        copied: Any = super() if self.is_leaf else super(AskedAlone, self)
        return copied.__deepcopy__(memo)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Of their tensor, which does not count as a use."""
        return repr(self._numbers.unnoticed())


def wait(rows: Tensor, weight: Tensor, bias: Tensor | None, origin: Origin) -> WaitingLogits:
    """`F.linear(rows, weight, bias)`, put off."""
    device_type = rows.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    term = Term(rows, weight, bias)
    apply: Any = _HeadProduct.apply
    waiting: WaitingLogits = apply(Logits((term,)), origin.product(term), rows, weight, bias)
    return waiting


class _HeadProduct(torch.autograd.Function):
    """Autograd's side of logits that wait: where they are made and used, the derivative of `F.linear`."""

    @staticmethod
    def forward(
        ctx: Any, logits: Logits, numbers: Numbers, rows: Tensor, weight: Tensor, bias: Tensor | None
    ) -> WaitingLogits:
        for_rows, for_weight, ctx.for_bias = ctx.needs_input_grad[2:]
        ctx.save_for_backward(rows if for_weight else None, weight if for_rows else None)
        ctx.set_materialize_grads(False)
        like = torch.empty((*rows.shape[:-1], weight.shape[0]), dtype=rows.dtype, device="meta")
        waiting: WaitingLogits = WaitingLogits(like, logits, (), numbers)
        return waiting

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 5
        rows, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        of_rows = None if weight is None else grad @ weight
        of_weight = None if rows is None else flat.t() @ rows.reshape(-1, rows.shape[-1])
        return None, None, of_rows, of_weight, flat.sum(0) if ctx.for_bias else None


Follow = Callable[[Any, Any, Any], "WaitingLogits | None"]


def _derived(func: Any, args: Any, kwargs: Any, logits: Logits, changes: tuple[Change, ...]) -> WaitingLogits:
    """What `func` makes of logits that wait, as something that waits."""
    parents = [each for each in args if isinstance(each, WaitingLogits)]

    def of(*values: Tensor) -> Tensor:
        following = iter(values)
        made: Tensor = func(*(next(following) if waits else each for waits, each in given), **kwargs)
        return made

    given = [(isinstance(each, WaitingLogits), None if isinstance(each, WaitingLogits) else each) for each in args]
    numbers = Numbers(parents[0]._numbers.origin, of, [each._numbers for each in parents])
    waiting: WaitingLogits = WaitingLogits(of(*map(_like, parents)), logits, changes, numbers)
    return waiting


def _like(waiting: WaitingLogits) -> Tensor:
    return torch.empty_strided(waiting.shape, waiting.stride(), dtype=waiting.dtype, device="meta")


def _own(waiting: WaitingLogits) -> Logits:
    """Those of a value that is used in another: without gradients where it has none."""
    return waiting._logits if waiting.requires_grad else waiting._logits.detached()


def _waits(value: Any) -> bool:
    """Made or not: a loss is the same function, whoever looks on."""
    return isinstance(value, WaitingLogits) and not value._written and version_of(value) in (0, None)


def _alias(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    """The same numbers, of another tensor to autograd."""
    (waiting,) = args
    if not _waits(waiting):
        return None
    another: WaitingLogits = WaitingLogits(_like(waiting), _own(waiting), waiting._changes, waiting._numbers)
    return another


def _copy(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    (waiting,) = args
    return _derived(func, args, kwargs, _own(waiting), waiting._changes) if _waits(waiting) else None


def _scaled(divided: bool) -> Follow:
    def follow(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
        waiting, by = args
        if not _waits(waiting) or type(by) not in (int, float) or kwargs:
            return None
        return _derived(func, args, kwargs, _own(waiting).then(lambda of: Scaled(of, by, divided)), waiting._changes)

    return follow


def _tanh(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    (waiting,) = args
    return _derived(func, args, kwargs, _own(waiting).then(Tanh), waiting._changes) if _waits(waiting) else None


def _cast(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    (waiting,), dtype = args, kwargs.get("dtype")
    only_that = all(value is None for name, value in kwargs.items() if name not in ("dtype", "memory_format"))
    if not _waits(waiting) or not only_that or dtype is None or not dtype.is_floating_point:
        return None
    return _derived(func, args, kwargs, _own(waiting).then(lambda of: Cast(of, dtype)), waiting._changes)


def _sum(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    first, second = args
    if not (_waits(first) and _waits(second)) or kwargs or first._numbers.origin is not second._numbers.origin:
        return None
    if first.shape != second.shape or first._changes or second._changes:
        return None
    return _derived(func, args, kwargs, _own(first).plus(_own(second)), ())


def _part(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    """Of the rows: `slice` and `select`."""
    waiting, *how = args
    dimension = how[0] if how else 0
    if not _waits(waiting) or kwargs or dimension % waiting.dim() == waiting.dim() - 1:
        return None
    how[:1] = [dimension % waiting.dim()]
    return _derived(func, args, kwargs, _own(waiting), (*waiting._changes, lambda rows: func(rows, *how)))


def _view(func: Any, args: Any, kwargs: Any) -> WaitingLogits | None:
    waiting, _ = args
    if not _waits(waiting):
        return None
    shape = func(_like(waiting), args[1]).shape
    if not shape or shape[-1] != waiting.shape[-1]:
        return None
    change = lambda rows: rows.reshape(*shape[:-1], rows.shape[-1])  # noqa: E731
    return _derived(func, args, kwargs, _own(waiting), (*waiting._changes, change))


FOLLOWED: dict[Any, Follow] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _copy,
    aten.mul.Tensor: _scaled(divided=False),
    aten.div.Tensor: _scaled(divided=True),
    aten.tanh.default: _tanh,
    aten._to_copy.default: _cast,
    aten.add.Tensor: _sum,
    aten.slice.Tensor: _part,
    aten.select.int: _part,
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
}


def _listeners(tensor: Tensor) -> list[Any]:
    hooks = [getattr(hook, "func", hook) for hook in (tensor._backward_hooks or {}).values()]
    return [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.distributed")]


def _reader() -> str:
    """The module that looks at them, for a report: the first on the way out that is neither torch nor ours."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".", 1)[0] not in QUIET:
            return name
        frame = frame.f_back
    return "torch"
