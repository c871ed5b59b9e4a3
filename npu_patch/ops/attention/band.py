"""Which keys a query sees: bands, bool masks, and the arguments that npu_fusion_attention takes for them.

The operator hides where its mask is True, the opposite of torch, takes a mask in exact shapes only, and ignores every
sparse mode when there is no mask. For the sparse modes used here the mask is one constant, [2048, 2048], whatever the
length: the kernel reads it at the diagonal blocks only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

UNLIMITED = 2147483647  # the operator's default for both ends of a band
COMPRESSED = 2048
DEFAULT_MASK, TOP_LEFT_CAUSAL, BOTTOM_RIGHT_CAUSAL, BAND = 0, 2, 3, 4  # sparse_mode


@dataclass(frozen=True)
class Band:
    """Query i sees key j where `i + shift - before <= j <= i + shift + after`; None is no limit.

    The shift is Skv - Sq with `bottom_right` (the last query sees the last key), else 0.
    """

    before: int | None = None
    after: int | None = None
    bottom_right: bool = True

    @property
    def is_full(self) -> bool:
        return self.before is None and self.after is None

    @property
    def is_causal(self) -> bool:
        return self.before is None and self.after == 0

    def within(self, queries: int, keys: int) -> Band:
        """The same band without the limits that lie beyond all the keys."""
        if self.before is None and self.after is None:
            return self
        shift = keys - queries if self.bottom_right else 0
        before = None if self.before is None or self.before >= queries - 1 + shift else self.before
        after = None if self.after is None or self.after >= keys - 1 - shift else self.after
        return self if (before, after) == (self.before, self.after) else Band(before, after, self.bottom_right)

    def visible(self, queries: int, keys: int) -> Tensor:
        """The bool mask [queries, keys] on the CPU, True where a query sees a key."""
        shift = keys - queries if self.bottom_right else 0
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - shift
        seen = torch.ones(queries, keys, dtype=torch.bool)
        if self.before is not None:
            seen &= distance >= -self.before
        if self.after is not None:
            seen &= distance <= self.after
        return seen


FULL = Band()
CAUSAL_TOP_LEFT = Band(after=0, bottom_right=False)


def band_arguments(band: Band, device: torch.device) -> dict[str, Any]:
    """Mask arguments of npu_fusion_attention for a band that `why_no_band` accepts."""
    arguments: dict[str, Any] = {
        "atten_mask": None,
        "sparse_mode": DEFAULT_MASK,
        "pre_tockens": UNLIMITED,
        "next_tockens": UNLIMITED,
    }
    if band.is_full:
        return arguments
    arguments["atten_mask"] = compressed_mask(device)
    if band.is_causal:
        arguments["sparse_mode"] = BOTTOM_RIGHT_CAUSAL if band.bottom_right else TOP_LEFT_CAUSAL
        return arguments
    before, after = band.before, band.after
    return arguments | {
        "sparse_mode": BAND,
        "pre_tockens": UNLIMITED if before is None else before,
        "next_tockens": UNLIMITED if after is None else after,
    }


def why_no_band(band: Band, queries: int, keys: int) -> str | None:
    """Why the operator has no sparse mode for a band, or None."""
    if band.is_full or band.is_causal or band.bottom_right or queries == keys:
        return None
    return "a window aligned to the top left for queries and keys of different lengths"


def inverted(mask: Tensor) -> Tensor:
    """torch's bool mask (True: seen) as the operator's (True: hidden), 4-D. What the mask only repeats (stride 0) is
    inverted once."""
    mask = mask[None, None] if mask.dim() == 2 else mask
    for axis in range(mask.dim()):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    return mask.logical_not()


def in_operator_shape(hidden: Tensor, batch: int, heads: int, queries: int, keys: int) -> Tensor | None:
    """A mask in one of the shapes that the operator takes, [B,N,Sq,Skv], [B,1,Sq,Skv] or [1,1,Sq,Skv]; None if it does
    not broadcast to the scores."""
    if not broadcasts(hidden, (batch, heads, queries, keys)) or hidden.dim() != 4:
        return None
    per_head = hidden.shape[1] != 1
    return hidden.expand(batch if per_head else hidden.shape[0], heads if per_head else 1, queries, keys)


def broadcasts(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether `tensor` broadcasts to `shape` without making it larger."""
    sizes = tensor.shape[::-1]
    return len(sizes) <= len(shape) and all(a in (1, b) for a, b in zip(sizes, shape[::-1], strict=False))


@cache
def compressed_mask(device: torch.device) -> Tensor:
    """The constant that every sparse mode above 1 needs: [2048, 2048], True above the diagonal.

    Made outside of inference mode, so that a later training step can save it for its backward.
    """
    with torch.inference_mode(False):
        return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool, device=device).triu_(1)


@contextlib.contextmanager
def nothing_kept() -> Iterator[None]:
    """A constant that was not there before is not there afterwards, but for who saved it."""
    before = compressed_mask.cache_info().currsize
    try:
        yield
    finally:
        if not before:
            compressed_mask.cache_clear()
