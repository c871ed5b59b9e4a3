"""Values that wait, for one who looks on and must not end their waiting: a recording, say."""

from __future__ import annotations

from typing import Any

from npu_patch.waiting.heads import DeferredHeads
from npu_patch.waiting.masks import PatternMask, plain
from npu_patch.waiting.sums import Deferred

__all__ = ["lasts_for_one_call", "looked_at", "plain", "stays_unwritten"]


def lasts_for_one_call(value: Any) -> bool:
    """Whether it means nothing outside the call of the layer that made it."""
    return isinstance(value, DeferredHeads)


def looked_at(value: Any) -> Any:
    """The tensor that a sum or a branch stands for, which goes on waiting; anything else is itself."""
    return value.copied() if isinstance(value, Deferred) else value


def stays_unwritten(value: Any) -> bool:
    """A mask that is known by its pattern: detached, it is one that waits by itself."""
    return isinstance(value, PatternMask)
