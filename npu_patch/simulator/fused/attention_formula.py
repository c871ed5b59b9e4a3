"""Attention over one sequence, forward and backward, in float32 with the roundings of the fused kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = torch.finfo(torch.float32).min  # what a masked score becomes
HIGHEST = torch.finfo(torch.float32).max

# The scores of as many elements are held at a time on the host; the rest of the heads waits.
MOST_SCORES = 1 << 25


@dataclass(frozen=True)
class Scores:
    """How scores come from q and k: `scale * (q @ k.mT + pse)`, or `scale * (q @ k.mT) + pse` if `pse_last`; masked
    ones become the lowest float32. `hidden`, `pse` and `kept` broadcast to [N, Sq, Skv]; `sink` is [N]; `kept` is the
    dropout mask."""

    scale: float
    hidden: Tensor | None = None
    pse: Tensor | None = None
    pse_last: bool = False
    sink: Tensor | None = None
    kept: Tensor | None = None
    keep_prob: float = 1.0
    empty_rows_give_zero: bool = False

    def heads(self, first: int, last: int) -> "Scores":
        """The same for heads first to last."""

        def part(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.dim() < 3 or tensor.shape[0] == 1 else tensor[first:last]

        return Scores(
            self.scale,
            part(self.hidden),
            part(self.pse),
            self.pse_last,
            None if self.sink is None else self.sink[first:last],
            part(self.kept),
            self.keep_prob,
            self.empty_rows_give_zero,
        )

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        scores = query.float() @ key.float().mT
        if self.pse is None:
            scores = scores * self.scale
        elif self.pse_last:
            scores = scores * self.scale + self.pse.float()
        else:
            scores = (scores + self.pse.float()) * self.scale
        return scores if self.hidden is None else scores.masked_fill(self.hidden, LOWEST)


def attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """query [N, Sq, D], key [Nkv, Skv, D], value [Nkv, Skv, Dv], N a multiple of Nkv -> out [N, Sq, Dv] in query's
    dtype, and the softmax's maximum and sum, float32 [N, Sq]."""
    parts = [_attend(*part) for part in _by_heads(query, key, value, scores)]
    return tuple(torch.cat(tensors, 0) for tensors in zip(*parts, strict=True))  # type: ignore[return-value]


def _attend(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    logits = scores.of(query, key)
    if key.shape[1] == 0:
        empty = query.new_zeros((*query.shape[:2], value.shape[-1]))
        return empty, torch.full(query.shape[:2], LOWEST), torch.full(query.shape[:2], HIGHEST)
    maximum = logits.amax(-1)
    if scores.sink is not None:
        maximum = torch.maximum(maximum, scores.sink.float()[:, None])
    weights = (logits - maximum[..., None]).exp()
    total = weights.sum(-1)
    if scores.sink is not None:
        total = total + (scores.sink.float()[:, None] - maximum).exp()
    if scores.kept is not None:
        weights = weights * scores.kept / scores.keep_prob
    out = (weights.to(query.dtype).float() @ value.float()) / total[..., None]
    if scores.empty_rows_give_zero and scores.hidden is not None:
        empty = scores.hidden.all(-1).expand(out.shape[:2])
        out = out.masked_fill(empty[..., None], 0.0)
        maximum = maximum.masked_fill(empty, LOWEST)
        total = total.masked_fill(empty, HIGHEST)
    return out.to(query.dtype), maximum, total


@dataclass(frozen=True)
class Gradients:
    """query, key, value in their dtype and shape; pse float32 [N, Sq, Skv] or None; sink float32 [N] or None."""

    query: Tensor
    key: Tensor
    value: Tensor
    pse: Tensor | None
    sink: Tensor | None


def attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    maximum: Tensor,
    total: Tensor,
    scores: Scores,
) -> Gradients:
    """Gradients of `attend` from its results; grad and out [N, Sq, Dv], maximum and total float32 [N, Sq]."""
    group = query.shape[0] // key.shape[0]
    parts = []
    for first, (q, k, v, some) in zip(_first_heads(query, key), _by_heads(query, key, value, scores), strict=True):
        heads = slice(first, first + q.shape[0])
        parts.append(_attend_backward(grad[heads], q, k, v, out[heads], maximum[heads], total[heads], some))
    dq, dk, dv, dpse, dsink = zip(*parts, strict=True)
    return Gradients(
        torch.cat(dq, 0).to(query.dtype),
        torch.cat(dk, 0).unflatten(0, (-1, group)).sum(1).to(key.dtype),
        torch.cat(dv, 0).unflatten(0, (-1, group)).sum(1).to(value.dtype),
        None if dpse[0] is None else torch.cat(dpse, 0),
        None if dsink[0] is None else torch.cat(dsink, 0),
    )


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    maximum: Tensor,
    total: Tensor,
    scores: Scores,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    dtype = query.dtype
    wide = grad.float()
    probabilities = (scores.of(query, key) - maximum[..., None]).exp() / total[..., None]
    empty = total == HIGHEST  # rows that attend marked so
    probabilities = probabilities.masked_fill(empty[..., None], 0.0)
    dropped = probabilities if scores.kept is None else probabilities * scores.kept / scores.keep_prob
    by_probability = wide @ value.float().mT
    if scores.kept is not None:
        by_probability = by_probability * scores.kept / scores.keep_prob
    delta = (wide * out.float()).sum(-1, keepdim=True)
    by_score = probabilities * (by_probability - delta)
    rounded = by_score.to(dtype).float()
    dpse = None
    if scores.pse is not None:
        dpse = by_score if scores.pse_last else by_score * scores.scale
    dsink = None
    if scores.sink is not None:
        sink_probability = ((scores.sink.float()[:, None] - maximum).exp() / total).masked_fill(empty, 0.0)
        dsink = -(sink_probability * delta.squeeze(-1)).sum(-1)
    return (
        rounded @ key.float() * scores.scale,
        rounded.mT @ query.float() * scores.scale,
        dropped.to(dtype).float().mT @ wide,
        dpse,
        dsink,
    )


def _heads_at_once(query: Tensor, key: Tensor) -> int:
    """A multiple of the group size, so that each part has whole key heads."""
    group = query.shape[0] // key.shape[0]
    per_head = max(1, query.shape[1] * key.shape[1])
    return max(1, MOST_SCORES // (per_head * group)) * group


def _first_heads(query: Tensor, key: Tensor) -> range:
    return range(0, query.shape[0], _heads_at_once(query, key))


def _by_heads(query: Tensor, key: Tensor, value: Tensor, scores: Scores) -> list[tuple[Tensor, Tensor, Tensor, Scores]]:
    """The computation in parts of some heads, key and value repeated to as many heads as the query has."""
    group = query.shape[0] // key.shape[0]
    step = _heads_at_once(query, key)
    parts = []
    for first in _first_heads(query, key):
        last = min(first + step, query.shape[0])
        own = slice(first // group, last // group)
        parts.append(
            (
                query[first:last],
                key[own].repeat_interleave(group, 0),
                value[own].repeat_interleave(group, 0),
                scores.heads(first, last),
            )
        )
    return parts
