"""Gated delta nets with a part of each sequence: their rule gets whole sequences of some heads; their convolution gets
the few tokens before its own, its state there, from the rank before.

Such layers look both functions up in their file (transformers >= 5.15). What exchanges stands there while one of the
layers runs, around what it finds there: an original, or what `apply()` bound, before or since.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from npu_patch.probe.gated_delta import CONVOLUTION, RULE, Reading, kind_of, read
from npu_patch.sequence_parallel.exchange import Group, from_the_rank_before, to_heads, together_to_tokens
from npu_patch.sites.journal import Journal
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import defining_class, innermost, unwrapped

Exchanging = Callable[[Callable[..., Any], int, int, Group], Callable[..., Any]]


def functions_of(layer: torch.nn.Module) -> tuple[ModuleType, dict[str, Exchanging]] | None:
    """Of a gated delta net: its file, and what exchanges around each of the functions there."""
    cls = defining_class(layer)
    file = sys.modules[cls.__module__]
    names = names_used(cls.forward)
    found = {name: kind for name in names if (kind := _kind(vars(file).get(name))) in (RULE, CONVOLUTION)}
    if set(found.values()) != {RULE, CONVOLUTION} or any(_kind(getattr(layer, name, None)) for name in names):
        return None
    return file, {name: _rule if kind == RULE else _convolution for name, kind in found.items()}


def _kind(value: Any) -> str | None:
    function = innermost(unwrapped(value))
    if function is None or kind_of(function) is None:
        return None
    reading = read(function, function)
    return reading.kind if isinstance(reading, Reading) else None


def hooked(
    layer: torch.nn.Module, journal: Journal, divided: Callable[[], bool], ranks: int, rank: int, group: Group
) -> list[RemovableHandle]:
    """None, if it is no gated delta net. Closures, which a copy of the layer has as well."""
    file, exchanging = functions_of(layer) or (None, {})

    def enter(*_: Any) -> None:
        journal.undo_to(0)  # of a layer that was interrupted
        for name, around in exchanging.items() if divided() else ():
            journal.rebind(file, name, around(vars(file)[name], ranks, rank, group))

    def leave(*_: Any) -> None:
        journal.undo_to(0)

    if not exchanging:
        return []
    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, always_call=True)]


def _rule(inner: Callable[..., Any], ranks: int, rank: int, group: Group) -> Callable[..., Any]:
    def exchanged(q: Tensor, k: Tensor, v: Tensor, /, *, g: Tensor, beta: Tensor, **others: Any) -> tuple[Tensor, Any]:
        repeats = ranks // math.gcd(ranks, k.shape[2])
        if repeats > 1:  # value heads take them in turn
            q, k = (each.repeat_interleave(repeats, 2) for each in (q, k))
        q, k, v, g, beta = together_to_tokens((q, k, v, g, beta), ranks, group)
        out, state = inner(q, k, v, g=g, beta=beta, **others)
        return to_heads(out, ranks, group), state

    return exchanged


def _convolution(inner: Callable[..., Tensor], ranks: int, rank: int, group: Group) -> Callable[..., Tensor]:
    def exchanged(x: Tensor, /, weight: Tensor, *args: Any, seq_idx: Tensor | None = None, **others: Any) -> Tensor:
        before, tokens = weight.shape[-1] - 1, x.shape[-1]
        if tokens < before:
            raise ValueError(
                f"{tokens} tokens of each sequence on a rank: a convolution needs the {before} before its own"
            )
        known = torch.cat((from_the_rank_before(x[..., tokens - before :], group), x), -1)
        if seq_idx is not None:  # of whole sequences
            others["seq_idx"] = F.pad(seq_idx, (before, 0))[:, rank * tokens : (rank + 1) * tokens + before]
            others.pop("cu_seq_lens_q", None)
        return inner(known, weight, *args, **others)[..., before:]

    return exchanged
