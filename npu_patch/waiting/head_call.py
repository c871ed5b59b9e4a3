"""The head of a language model, made to return logits that wait for as long as one forward of the model runs.

Each linear layer of the head as wide as the vocabulary (the head itself; base layer and adapter of one that peft
wrapped) is handed its input as `Handed`, which puts its product off. What else the head does with it, it does.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

from npu_patch.serving.implementation import is_plain
from npu_patch.serving.listeners import listener, listener_among
from npu_patch.waiting.logits import wait
from npu_patch.waiting.origins import Origin
from npu_patch.waiting.sharded_head import keeps_its_weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class HeadCall:
    """Of one forward of a model. `why_not`: why the head's product was not put off, where it was called."""

    def __init__(
        self, device_type: str, count: Callable[[str], None], holders: tuple[torch.nn.Module, ...] = ()
    ) -> None:
        self.waited = False
        self.why_not: str | None = None
        self._device_type, self._count, self._holders = device_type, count, holders
        self._origin: Origin | None = None
        self._thread = threading.get_ident()

    def starts(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        """Of the head: what its layers make belongs together."""
        self._origin = Origin(self._count, self._holders)

    def hand(self, module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """To one of its layers."""
        if self._origin is None or len(args) != 1 or self._thread != threading.get_ident():
            return None
        return (Handed(args[0], self),) if is_plain(args[0]) else None

    def product(self, rows: Tensor, weight: Any, bias: Any = None) -> Tensor | None:
        self.why_not = _why_not(self._device_type, rows, weight, bias)
        if self.why_not is not None or self._origin is None:
            return None
        self.waited = True
        return wait(rows, weight, bias, self._origin)


def _why_not(device_type: str, rows: Tensor, weight: Any, bias: Any) -> str | None:
    if rows.device.type != device_type:
        return f"input on {rows.device.type}"
    if _transformed():
        return "a transform of torch.func"
    given = [each for each in (rows, weight, bias) if each is not None]
    if not all(isinstance(each, Tensor) and is_plain(each) for each in given):
        return "a head whose weight is no plain tensor"
    if rows.dim() < 2 or rows.shape[-2] < 2 or rows.numel() == 0:
        return "logits of single tokens"
    dtypes = {each.dtype for each in given}
    autocast = torch.is_autocast_enabled(rows.device.type)
    if not dtypes <= set(DTYPES) or (len(dtypes) > 1 and not autocast):
        return f"a head of {', '.join(sorted(str(dtype) for dtype in dtypes))}"
    if len({each.device for each in given}) > 1:
        return "hidden states on another device than the head"
    return None


def _transformed() -> bool:
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


class Handed(torch.Tensor):
    """The input of a linear layer; to everything but its product, the tensor that it is."""

    _given: tuple[Tensor, HeadCall]

    @staticmethod
    def __new__(cls, rows: Tensor, call: HeadCall) -> Any:
        handed = rows.detach().as_subclass(cls)
        handed._given = rows, call
        return handed

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and type(args[0]) is cls:
            rows, call = args[0]._given
            product = call.product(rows, *args[1:], **kwargs)
            if product is not None:
                return product
        args, kwargs = tree_map_only(cls, lambda each: each._given[0], (tuple(args), kwargs))
        return func(*args, **kwargs)


def is_put_off(layer: torch.nn.Module) -> bool:
    """Whether the product of this layer is left to who takes the logits."""
    return any(isinstance(getattr(hook, "__self__", None), HeadCall) for hook in layer._forward_pre_hooks.values())


def layers_of(head: torch.nn.Module) -> list[torch.nn.Module] | str:
    """Its linear layers with the most columns; or why it is left as it is."""
    heard = listener(head, "the head") or listener_among(head)
    if heard is not None and not keeps_its_weights(head):
        return heard
    linear = [
        each
        for each in head.modules()
        if isinstance(each, torch.nn.Linear) and type(each).forward is torch.nn.Linear.forward
    ]
    width = max((each.out_features for each in linear), default=0)
    found: list[torch.nn.Module] = [each for each in linear if each.out_features == width]
    if not found:
        return f"the head is a {type(head).__name__}, not made of linear layers"
    if any(each._compiled_call_impl is not None for each in (head, *found)):
        return "the head is compiled"
    return found


@contextlib.contextmanager
def put_off(
    head: torch.nn.Module,
    layers: list[torch.nn.Module],
    device_type: str,
    count: Callable[[str], None],
    embeddings: torch.nn.Module | None = None,
) -> Iterator[HeadCall]:
    """Within it, logits on such a device wait. `count` is told who looks at them, then or later, once for each call.
    `embeddings`: those of the model, which may have the head's weights."""
    call = HeadCall(device_type, count, (head,) if embeddings is None else (head, embeddings))
    handles = [head.register_forward_pre_hook(call.starts, prepend=True)]
    handles += [layer.register_forward_pre_hook(call.hand) for layer in layers]
    try:
        yield call
    finally:
        for handle in handles:
            handle.remove()
