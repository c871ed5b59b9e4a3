"""The loss that transformers looks up for a model, of logits that wait: in chunks, so that they never exist."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.readings import NotRead
from npu_patch.ops.token_losses import key
from npu_patch.patches.loss.cases import cases
from npu_patch.patches.loss.takers import LOSSES, taken, why_made
from npu_patch.patches.patch import Context, Replacement
from npu_patch.probe.losses import NO_LABEL, LossReading, read_loss, shifted
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.sites import Site
from npu_patch.waiting.logits import WaitingLogits


def replace(site: Site, context: Context) -> Replacement | NotRead:
    reading = read_loss(site.original)
    if isinstance(reading, NotRead):
        return reading
    calls, device_type, dispatch = Calls(), context.device_type, context.dispatch(cases, key)
    signature = inspect.signature(site.original)

    def serve(*args: Any, **kwargs: Any) -> Tensor | Unserved:
        given = signature.bind(*args, **kwargs).arguments
        logits = given["logits"]
        if type(logits) is not WaitingLogits:
            return Unserved(why_made(logits, device_type))
        labels = _labels(reading, logits, given)
        if isinstance(labels, str):
            return Unserved(labels)
        found = taken(logits, calls, dispatch, labels)
        if isinstance(found, str):
            return Unserved(found)
        made_of, token_losses = found
        divisor = given.get("num_items_in_batch")
        if isinstance(divisor, Tensor):
            divisor = divisor.to(logits.device)
        return chunked_loss.cross_entropy(
            made_of, labels, token_losses, ignore_index=given.get("ignore_index", NO_LABEL), divisor=divisor
        )

    function = replacement_for(site.original, calls, serve)
    LOSSES[function] = calls
    return Replacement(function, reading.name, calls, dispatch=dispatch)


def _labels(reading: LossReading, logits: Tensor, given: dict[str, Any]) -> Tensor | str:
    """Of each row of the logits; or why that is for the original to say."""
    if given["vocab_size"] != logits.shape[-1]:
        return f"logits of {logits.shape[-1]} columns for a vocabulary of {given['vocab_size']}"
    labels = given.get("shift_labels")
    if labels is None:
        labels = given["labels"]
        if reading.shifted and isinstance(labels, Tensor):
            labels = shifted(labels, given.get("ignore_index", NO_LABEL))
    if not isinstance(labels, Tensor):
        return "no labels"
    if labels.numel() != logits.shape[:-1].numel():
        return "labels of another number than the logits"
    return labels.reshape(-1).to(logits.device)
