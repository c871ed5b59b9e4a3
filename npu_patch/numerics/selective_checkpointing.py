"""Operators that selective checkpointing is not to see.

It keeps what single operators return in the forward, by their number, and hands it out when it recomputes. Of an
implementation that writes into its own intermediate results, or that computes something once per step, it would hand
out something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils import _python_dispatch, checkpoint

# Where this torch has none of these names, it has no selective checkpointing.
_NAMES = ("_CachingTorchDispatchMode", "_CachedTorchDispatchMode")
_MODES = tuple(vars(checkpoint)[name] for name in _NAMES if name in vars(checkpoint))


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Other modes go on seeing them."""
    if not torch._C._len_torch_dispatch_stack():
        yield
        return
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    others = [mode for mode in modes if not isinstance(mode, _MODES)]
    if len(others) == len(modes):
        yield
        return
    _replace(modes, others)
    try:
        yield
    finally:
        _replace(others, modes)


def _replace(present: list[Any], wanted: list[Any]) -> None:
    for _ in present:
        _python_dispatch._pop_mode()
    for mode in wanted:
        _python_dispatch._push_mode(mode)
