"""One quantisation for layers that are given one tensor, one after the other: q, k and v, or gate and up.

What a thread quantised last is remembered until the next call, and no longer: the very tensor that it was made of,
unchanged, needs no second quantisation. Where the next call was given something else, nothing is remembered for that
layer from then on; nor when the tensor is gone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.ops.w8a8.linear import Quantise, rows_of
from npu_patch.ops.w8a8.quantised import Quantised


@dataclass(eq=False)
class _Last:
    """Of a thread: whose call it was, and what `rows` were made of."""

    layer: ref[Any]
    made_of: tuple[Any, ...] = ()
    x: Callable[[], Tensor | None] = lambda: None
    rows: Quantised | None = None


class _OfThread(threading.local):
    last: _Last | None = None


_OF_THREAD = _OfThread()
_ALONE: WeakSet[Any] = WeakSet()  # layers after which the next one is given something else


def shared_rows(layer: Any, trusted: bool, x: Tensor, dtype: torch.dtype, quantise: Quantise) -> Quantised:
    """`rows_of(x, dtype, quantise)`, made once for calls in a row. `layer`: whose call this is.

    `trusted`: nobody changes x in place between this call and its neighbours, which a tensor of `inference_mode` would
    not tell. Of others their version tells.
    """
    last, _OF_THREAD.last = _OF_THREAD.last, None
    known, trusted = None, trusted or not x.is_inference()
    made_of = dtype, quantise, None if x.is_inference() else x._version, x.data_ptr(), _stream(x)
    if last is not None:
        before, same = last.layer(), last.x() is x
        if before is not None:
            (_ALONE.discard if same else _ALONE.add)(before)
        if same and trusted and last.made_of == made_of:
            known = last.rows
    if known is None:
        with unseen():
            known = rows_of(x, dtype, quantise)
    _OF_THREAD.last = _remembered(layer, x, made_of, known if trusted and layer not in _ALONE else None)
    return known


def _remembered(layer: Any, x: Tensor, made_of: tuple[Any, ...], rows: Quantised | None) -> _Last:
    found = _Last(ref(layer), made_of, rows=rows)
    weak = ref(found)

    def x_is_gone(_: Any) -> None:
        last = weak()
        if last is not None:
            last.rows = None

    found.x = ref(x, x_is_gone)
    return found


def _stream(x: Tensor) -> Any:
    """On which rows are made, and may be read without waiting."""
    device = x.device
    return torch._C._accelerator_getStream(device.index) if device.type in ACCELERATORS else None
