"""By what a tuning file knows a call: of each of its tensors the dtype, and the bucket of its shape.

A bucket is the number of dimensions, the number of rows rounded up to a power of two, and the width of a row. Batches
of unlike lengths, as nearly all are, are then decided by what was measured at one length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor

Signature = tuple[tuple[torch.dtype | str, tuple[int, ...]], ...]


def signature_of(*call: Any) -> Signature:
    """Of an op's call, with the tensors in its sequences and dataclasses. Not whether gradients are on: who watches
    decides nothing."""
    return tuple((tensor.dtype, bucket(tensor.shape)) for tensor in tensors_in(call))


def bucket(shape: Sequence[int]) -> tuple[int, ...]:
    if not shape:
        return (0,)
    return len(shape), 1 << max(math.prod(shape[:-1]) - 1, 0).bit_length(), shape[-1]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
        elif is_dataclass(value):
            yield from tensors_in(vars(value).values())
