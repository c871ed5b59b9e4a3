"""The cross entropy that transformers' losses look up, of logits that wait: in chunks, so that they never exist.

Not the entries of `LOSS_MAPPING`: Trainer asks which function they are, to know whether it shifts the labels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.chunked_loss import StandIn
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.loss.cases import cases
from npu_patch.patches.loss.takers import LOSSES, taken, why_made
from npu_patch.patches.patch import Context, Replacement
from npu_patch.probe.losses import IGNORED, NO_LABEL, NUMBER, read_cross_entropy
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.names_used import names_used
from npu_patch.sites.sites import Site
from npu_patch.waiting.logits import WaitingLogits

CROSS_ENTROPY = "fixed_cross_entropy"


def registered() -> Iterator[Site]:
    from transformers.loss import loss_utils

    function = getattr(loss_utils, CROSS_ENTROPY, None)
    if isinstance(function, FunctionType):
        yield Site(loss_utils, CROSS_ENTROPY, function)


def ends_here(loss: Any) -> bool:
    """Whether a model's loss function asks for the cross entropy that is served now."""
    if not isinstance(loss, FunctionType) or CROSS_ENTROPY not in names_used(loss):
        return False
    cross_entropy: Any = loss.__globals__.get(CROSS_ENTROPY)
    return cross_entropy in LOSSES and LOSSES[cross_entropy].active


def read_site(site: Site) -> AsNamed | NotRead:
    return read_cross_entropy(site.original)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls, device_type, dispatch = Calls(), context.device_type, context.dispatch(cases)
    signature = inspect.signature(site.original)

    def serve(*args: Any, **kwargs: Any) -> Tensor | Unserved:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        given = signature.bind(*args, **kwargs).arguments
        logits, labels = given["source"], given["target"]
        if type(logits) is not WaitingLogits:
            return Unserved(why_made(logits, device_type))
        if logits.dtype != torch.float32:
            return Unserved(f"logits of {logits.dtype}")
        if logits.dim() != 2 or labels.shape != logits.shape[:1] or labels.device != logits.device:
            return Unserved(f"labels {tuple(labels.shape)} on {labels.device} of logits {tuple(logits.shape)}")
        found = taken(logits, calls, dispatch, labels)
        if isinstance(found, str):
            return Unserved(found)
        divisor = given.get(NUMBER)
        if isinstance(divisor, Tensor):
            divisor = divisor.to(logits.device)
        return chunked_loss.cross_entropy(
            found[0],
            labels,
            found[1],
            stand_in=StandIn(logits, logits.heard),
            ignore_index=given.get(IGNORED, NO_LABEL),
            divisor=divisor,
        )

    function = replacement_for(site.original, calls, serve)
    LOSSES[function] = calls
    return Replacement(function, reading.name, calls, dispatch=dispatch, alone=False)
