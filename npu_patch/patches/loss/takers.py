"""Who takes logits that wait: the losses that models ask for, and what is called with the logits of a forward that was
given no labels. The models' forwards ask, before they let their head's logits wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.head_products import Logits
from npu_patch.ops.token_losses import TokenLosses
from npu_patch.serving.calls import Calls
from npu_patch.serving.dispatch import Dispatch
from npu_patch.waiting.logits import WaitingLogits

# By what is called in the place of the original.
LOSSES: WeakKeyDictionary[Callable[..., Any], Calls] = WeakKeyDictionary()
WITHOUT_LABELS: WeakKeyDictionary[Callable[..., Any], Calls] = WeakKeyDictionary()


def any_without_labels() -> bool:
    return any(calls.active for calls in WITHOUT_LABELS.values())


def why_made(logits: Any, device_type: str) -> str:
    """Why these do not wait."""
    elsewhere = isinstance(logits, Tensor) and logits.device.type != device_type
    return f"input on {logits.device.type}" if elsewhere else "logits that are there already"


def taken(logits: WaitingLogits, calls: Calls, dispatch: Dispatch, labels: Tensor) -> tuple[Logits, TokenLosses] | str:
    """What the logits are made of and what computes the losses of a chunk; or why the original has to."""
    if type(labels) is not Tensor or labels.dtype != torch.int64:
        return f"labels that are no plain tensor of int64, but {getattr(labels, 'dtype', type(labels).__name__)}"
    made_of = logits.taken()
    if isinstance(made_of, str):
        return made_of
    rows = chunked_loss.chunks(made_of.rows, made_of.vocabulary)[0]
    chunk = torch.empty((rows.stop, made_of.vocabulary), dtype=torch.float32, device="meta")
    serving = dispatch.serving(calls, chunk, torch.empty(rows.stop, dtype=torch.int64, device="meta"))
    return serving if isinstance(serving, str) else (made_of, serving.run)
