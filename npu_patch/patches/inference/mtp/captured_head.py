"""Greedy drafts of a head, all of a check in one replay: where checks are replays, over a static cache of its own.

A head is given the tokens that were accepted since it was asked last, a few at most. Here they are filled up to one
number of rows, of which the last one that counts is known on the device. Imported once transformers is.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, StaticCache, StaticLayer

from npu_patch.decoding import cache as caches
from npu_patch.decoding.draft_cache import DraftCache
from npu_patch.decoding.host_state import Observed, observe
from npu_patch.decoding.inputs import StepInputs
from npu_patch.decoding.kept import KEPT, KeptStep, Lease
from npu_patch.decoding.session import mode
from npu_patch.decoding.step import Step
from npu_patch.serving.calls import Calls

HIDDEN, POSITIONS, NUMBERS, CACHE = "hidden", "position_ids", "numbers", "past_key_values"
GIVEN = (HIDDEN, POSITIONS, NUMBERS)


class HeadCache(StaticCache):
    """As transformers' MtpCache, but static: depth k of a head runs k + 1 tokens ahead. `length`: of all its layers,
    as the host knows it; a step is given it. `drafts`: who makes those of the call that uses it."""

    layers: list[Any]

    def __init__(self, depths: int, length: int) -> None:
        Cache.__init__(self, layers=[StaticLayer(length) for _ in range(depths)])
        self.length = 0
        self.drafts: Any = None

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        return super().get_query_offset(layer_idx) + layer_idx + 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        length, offset = super().get_mask_sizes(query_length, layer_idx)
        return length, offset + layer_idx + 1

    def crop(self, tokens_to_remove: int) -> None:
        self.length += tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.length = 0


class Drafts:
    """Of one call of generate(). `kept`: what replays them, once the first check was made; `refused`: nothing does."""

    def __init__(self, head: Any, model: Any, lease: Lease, calls: Calls) -> None:
        self.head, self.model, self.cache, self.calls = head, model, lease.cache, calls
        self.depths = len(head.layers)
        self.width = max(self.depths + 1, 2 * self.depths - 1)  # of few that were accepted, with the depths before them
        self.device = head.layers[0].eh_proj.weight.device
        self.kept: KeptStep | None = None
        self.refused = False

    def __call__(self, ids: Tensor, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        rows, length = ids.shape[1], self.cache.length
        numbers = torch.tensor((length, rows - 1))
        self.cache.length += rows
        kept = self._kept() if length > 0 and rows <= self.width else None  # not for the prompt
        if kept is not None and kept.step.is_proven:
            found = self._replayed(kept.step, {HIDDEN: hidden, POSITIONS: positions}, ids, numbers)
        else:
            more = 0 if kept is None else self.width - rows
            given = {HIDDEN: F.pad(hidden, (0, 0, 0, more)), POSITIONS: F.pad(positions, (0, more)), CACHE: self.cache}
            given[NUMBERS] = numbers.to(ids.device)
            ids = F.pad(ids, (0, more))
            found = self._run(ids, given) if kept is None else self._proved(kept, ids, given)
        return found["tokens"], found["logits"]

    def _kept(self) -> KeptStep | None:
        if self.kept is None and not self.refused:
            key = "head", self.depths, mode(self.device.type)
            found = observed(self.head, self.model, self.device)
            self.kept = KEPT.of(self.model).step(key, found, self.cache)
            if self.kept.why_not is not None:
                self._refuse(self.kept.why_not)
        return self.kept if self.calls.active else None

    def _run(self, ids: Tensor, given: Mapping[str, Any]) -> dict[str, Tensor]:
        """As `MtpModel.forward` with greedy drafts, the last row that counts being one of many."""
        hidden, positions, numbers = (given[name] for name in GIVEN)
        length, last = numbers.unbind()
        last = last.view(1)
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(length)
        tokens, logits = [], []
        for depth in range(self.depths):
            hidden = self.head.forward_layer(depth, hidden, positions, self.cache, input_ids=ids)
            logits.append(self.head._project_to_logits(hidden.index_select(1, last)))
            tokens.append(logits[-1][:, -1].argmax(-1, keepdim=True))
            behind = positions.index_select(1, last) + 1
            ids = torch.cat((ids[:, 1:], tokens[-1]), -1).index_copy_(1, last, tokens[-1])
            positions = torch.cat((positions[:, 1:], behind), -1).index_copy_(1, last, behind)
        return {"tokens": torch.cat(tokens, 1), "logits": torch.cat(logits, 1)}

    def _proved(self, kept: KeptStep, ids: Tensor, given: dict[str, Any]) -> dict[str, Tensor]:
        length = caches.length_of(self.cache)
        inputs_of = partial(StepInputs.of, length=length, width=self.width, taken=GIVEN)
        now = partial(observed, self.head, self.model, self.device)
        found, reason = kept.prove(self._run, ids, given, inputs_of, now)
        if reason is not None:
            self._refuse(reason)
        drafted: dict[str, Tensor] = found
        return drafted

    def _replayed(self, step: Step, given: dict[str, Tensor], ids: Tensor, numbers: Tensor) -> dict[str, Tensor]:
        assert step.inputs is not None and step.graph is not None
        rows, places = ids.shape[1], step.inputs.tensors
        step.inputs.tokens[:, :rows].copy_(ids)
        for name, value in given.items():
            places[name][:, :rows].copy_(value)
        places[NUMBERS].copy_(numbers)
        step.graph.replay()
        self.calls.ran += 1
        found: dict[str, Tensor] = step.graph.result[1]
        return found

    def _refuse(self, reason: str) -> None:
        self.kept, self.refused = None, True
        self.calls.fell_through[reason] += 1


def observed(head: Any, model: Any, device: torch.device) -> Observed:
    """Both, for a head is made of parts of the model."""
    own, others = observe(head, device.type), observe(model, device.type)
    why_not = own.why_not or others.why_not
    return Observed((own.state, others.state), why_not, hash((own.dtypes, others.dtypes)), (*own.loose, *others.loose))


def why_not(made: Any, cache: DraftCache) -> str | None:
    """Why a generator's drafts are not to be captured."""
    if cache.why_eager is not None:
        return cache.why_eager
    if made.do_sample or made.logits_processor:
        return "drafts are drawn, or processed"
    if made.device != cache.at.device:
        return "the head is on another device"
    return None


def begin(made: Any, model: Any, cache: DraftCache, calls: Calls) -> str | None:
    """Has a generator, whose head is asked for the first time, draft over a static cache; or the reason why not."""
    head = made.mtp_model
    depths = len(head.layers)
    found = observed(head, model, made.device)
    kind = "head", depths, made.device, found.dtypes, mode(made.device.type)
    reason = found.why_not or why_not(made, cache)
    if reason is not None:
        return reason
    lease = KEPT.of(model).lease(caches.length_of(cache), kind, partial(HeadCache, depths))
    if isinstance(lease, str):
        return lease
    made.mtp_cache = lease.cache
    weakref.finalize(made, _end, lease)
    lease.cache.drafts = Drafts(head, model, lease, calls)
    return None


def _end(lease: Lease) -> None:
    lease.in_use, lease.cache.drafts = False, None
