"""A tensor that can be made again: who would keep it for a backward keeps what it was made of, which is kept anyway.

Offered within a block, for whoever is given the very tensor there: `remade(x)` says how, and of what.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Remade(NamedTuple):
    """`make(*parts)`, bit by bit."""

    make: Callable[..., Tensor]
    parts: tuple[Tensor, ...]


class Offer(NamedTuple):
    product: Tensor
    version: int
    remade: Remade


class _OfThread(threading.local):
    offer: Offer | None = None


_OF_THREAD = _OfThread()


def offered(offer: Offer | None) -> Offer | None:
    """From now on, in place of what is returned: offer that again afterwards."""
    before, _OF_THREAD.offer = _OF_THREAD.offer, offer
    return before


def remade(x: Tensor) -> Remade | None:
    """How to make x again, if it is offered, unchanged, and not moved or made again by others' hooks anyway."""
    offer = _OF_THREAD.offer
    if offer is None or offer.product is not x or x._version != offer.version:
        return None
    return offer.remade


def packed_already() -> bool:
    """Whether other hooks take what autograd keeps (non-reentrant checkpointing makes everything again, offloading
    moves it); where this torch does not tell, as if there were some."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
