"""The loss of transformers' Trainer with smoothed labels, of logits that wait."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.chunked_loss import StandIn
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.loss.cases import cases
from npu_patch.patches.loss.takers import WITHOUT_LABELS, taken, why_made
from npu_patch.patches.patch import Context, Replacement
from npu_patch.probe.losses import EPSILON, IGNORED, NUMBER, SHIFTED, logits_among, read_label_smoothing
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.sites import Site
from npu_patch.waiting.logits import WaitingLogits

MODULE, SMOOTHER, CALL = "transformers.trainer_pt_utils", "LabelSmoother", "__call__"


def find(module: ModuleType) -> Iterator[Site]:
    smoother = vars(module).get(SMOOTHER)
    function = vars(smoother).get(CALL) if isinstance(smoother, type) else None
    if isinstance(function, FunctionType):
        yield Site(smoother, CALL, function)


def read_site(site: Site) -> AsNamed | NotRead:
    return read_label_smoothing(site.owner, site.original)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls, device_type, dispatch = Calls(), context.device_type, context.dispatch(cases)
    signature = inspect.signature(site.original)

    def serve(smoother: Any, *args: Any, **kwargs: Any) -> Tensor | Unserved:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        given = signature.bind(smoother, *args, **kwargs).arguments
        logits, labels = logits_among(given["model_output"]), given["labels"]
        epsilon, ignored = getattr(smoother, EPSILON), getattr(smoother, IGNORED)
        if type(logits) is not WaitingLogits:
            return Unserved(why_made(logits, device_type))
        if type(epsilon) not in (int, float) or type(ignored) is not int:
            return Unserved(f"epsilon or ignored index that are no numbers, but {epsilon!r} and {ignored!r}")
        if labels.shape != logits.shape[:-1] or labels.device != logits.device:
            return Unserved(f"labels {tuple(labels.shape)} on {labels.device} of logits {tuple(logits.shape)}")
        if given.get(SHIFTED):
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        if type(logits) is not WaitingLogits:  # written to: a part of them is no longer of what waits
            return Unserved(why_made(logits, device_type))
        found = taken(logits, calls, dispatch, labels)
        if isinstance(found, str):
            return Unserved(found)
        divisor = given.get(NUMBER)
        return chunked_loss.cross_entropy(
            found[0],
            torch.where(labels == ignored, labels, labels.clamp(min=0)),
            found[1],
            stand_in=StandIn(logits, logits.heard),
            ignore_index=ignored,
            divisor=divisor.to(logits.device) if isinstance(divisor, Tensor) else divisor,
            label_smoothing=epsilon,
        )

    function = replacement_for(site.original, calls, serve)
    WITHOUT_LABELS[function] = calls
    return Replacement(function, reading.name, calls, dispatch=dispatch, alone=False)
