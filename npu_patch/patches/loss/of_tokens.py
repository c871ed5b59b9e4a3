"""The log-probabilities of chosen tokens, and the entropy of each, of logits that wait: trl's functions for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
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
from npu_patch.probe.losses import ROW_MASK, TEMPERATURE, read_entropy, read_log_probabilities
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved, replacement_for
from npu_patch.sites.sites import Site
from npu_patch.waiting.logits import WaitingLogits

# Under these names they are looked for; what they compute is observed.
READ: Mapping[str, Callable[[Any], AsNamed | NotRead]] = {
    "selective_log_softmax": read_log_probabilities,
    "entropy_from_logits": read_entropy,
}


def find(module: ModuleType) -> Iterator[Site]:
    for name in READ:
        function = vars(module).get(name)
        if isinstance(function, FunctionType):
            yield Site(module, name, function)


def read_site(site: Site) -> AsNamed | NotRead:
    return READ[site.name](site.original)


def bind_site(site: Site, reading: AsNamed, context: Context) -> Replacement:
    calls, device_type, dispatch = Calls(), context.device_type, context.dispatch(cases)
    signature = inspect.signature(site.original)
    of_entropy = "index" not in signature.parameters

    def serve(*args: Any, **kwargs: Any) -> Tensor | Unserved:
        if torch.compiler.is_compiling():
            return Unserved("being compiled")
        given = signature.bind(*args, **kwargs).arguments
        logits = given["logits"]
        if type(logits) is not WaitingLogits:
            return Unserved(why_made(logits, device_type))
        if of_entropy:
            index = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
        else:
            index = given["index"]
        if index.shape != logits.shape[:-1] or index.device != logits.device:
            return Unserved("an index of several tokens for each row, or on another device")
        temperature = given.get(TEMPERATURE, 1.0)
        if temperature <= 0:
            return Unserved(f"a temperature of {temperature}")
        if temperature != 1.0:
            logits = logits / temperature
        found = taken(logits, calls, dispatch, index)
        if isinstance(found, str):
            return Unserved(found)
        stand_in = StandIn(logits, logits.heard)
        log_probabilities, entropy = chunked_loss.chosen(found[0], index, found[1], of_entropy, stand_in)
        result = (log_probabilities if entropy is None else entropy).to(logits.dtype)
        mask = given.get(ROW_MASK)
        return result if mask is None else result.masked_fill(mask == 0, 0.0)

    function = replacement_for(site.original, calls, serve)
    WITHOUT_LABELS[function] = calls
    return Replacement(function, reading.name, calls, dispatch=dispatch, alone=False)
