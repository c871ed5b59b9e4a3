"""By what a tuning file knows a call: the dtype and shape of each of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

Signature = tuple[tuple[torch.dtype | str, tuple[int, ...]], ...]


def signature_of(*call: Any) -> Signature:
    """Of an op's call, with the tensors in its sequences and dataclasses. Not whether gradients are on: who watches
    decides nothing."""
    return tuple((tensor.dtype, tensor.shape) for tensor in _tensors_in(call))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors_in(value)
        elif is_dataclass(value):
            yield from _tensors_in(vars(value).values())
