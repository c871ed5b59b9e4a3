"""Whether a function is the loss of a language model, or takes the log-probabilities of tokens, of logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import AsNamed, NotRead

BATCH, TOKENS, VOCABULARY = 2, 6, 7
NO_LABEL = -100
LABELS = ((3, 0, NO_LABEL, 6, 2, 1), (5, 3, 3, NO_LABEL, 0, 4))
SHIFTED = ((0, NO_LABEL, 6, 2, 1, 5), (3, 3, NO_LABEL, 0, 4, 2))
INDEX = ((3, 0, 2, 6, 2, 1), (5, 3, 3, 1, 0, 4))
Call = Mapping[str, Any]


@dataclass(frozen=True)
class LossReading:
    """Cross entropy in float32 over labels that are not `ignore_index`, divided by `num_items_in_batch` if that is
    given. `shifted`: of the following token, but for `shift_labels`."""

    shifted: bool

    @property
    def name(self) -> str:
        return "cross entropy of the next token" if self.shifted else "cross entropy"


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    return F.pad(labels, (0, 1), value=ignore_index)[..., 1:]


def read_loss(function: Callable[..., Any]) -> LossReading | NotRead:
    parameters = inspect.signature(function).parameters
    if not {"logits", "labels", "vocab_size", "num_items_in_batch"} <= parameters.keys():
        return NotRead("takes no logits with labels", notable=False)
    with quiet_room():
        for reading in (LossReading(shifted=True), LossReading(shifted=False)):
            calls = list(_calls_of_a_loss(parameters))
            if all(
                _distance(function, lambda each, r=reading: _loss(r, **each), call, dtype) <= 1.0
                for call in calls
                for dtype in (torch.float32, torch.bfloat16)
            ):
                return reading
    return NotRead("computes something else than the cross entropy of its logits")


def _calls_of_a_loss(parameters: Mapping[str, Any]) -> Iterator[Call]:
    """What it is given beside the logits; the last with what must not matter to it."""
    labels = {"labels": _integers(LABELS), "vocab_size": VOCABULARY}
    yield labels
    yield labels | {"num_items_in_batch": 5}
    yield labels | {"num_items_in_batch": _integers(3)}
    if "ignore_index" in parameters:
        yield labels | {"labels": _integers(INDEX), "ignore_index": 3}
    if "shift_labels" in parameters:
        yield labels | {"shift_labels": _integers(SHIFTED)}
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        others = {"weight": values((VOCABULARY,), 5).exp(), "label_smoothing": 0.3, "reduction": "none"}
        yield labels | {name: value for name, value in others.items() if name not in parameters}


def _loss(
    reading: LossReading,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Any = None,
    ignore_index: int = NO_LABEL,
    shift_labels: Tensor | None = None,
    **others: Any,
) -> Tensor:
    if shift_labels is None:
        shift_labels = shifted(labels, ignore_index) if reading.shifted else labels
    reduction = "mean" if num_items_in_batch is None else "sum"
    flat = logits.float().view(-1, vocab_size)
    loss = F.cross_entropy(flat, shift_labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


TEMPERATURE, ROW_MASK = "temperature", "row_mask"


def log_probabilities(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    found = (logits / temperature).log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy(logits: Tensor) -> Tensor:
    each = logits.log_softmax(-1)
    return -(each.exp() * each).sum(-1)


def read_log_probabilities(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(logits, index)`, as trl's `selective_log_softmax`."""
    names = tuple(inspect.signature(function).parameters)
    if names[:2] != ("logits", "index") or not set(names[2:]) <= {TEMPERATURE, ROW_MASK}:
        return NotRead(f"takes {', '.join(names)}, whose meaning is not known")
    index = {"index": _integers(INDEX)}
    calls = [index]
    if TEMPERATURE in names:
        calls.append(index | {TEMPERATURE: 0.7})
    if ROW_MASK in names:
        calls.append(index | {ROW_MASK: _integers(INDEX) % 2})
    return _as_named(function, log_probabilities, calls, "log-probabilities of tokens")


def read_entropy(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(logits)`, as trl's `entropy_from_logits`."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters[0].name != "logits" or not all(each.name == "chunk_size" for each in parameters[1:]):
        return NotRead(f"takes {', '.join(each.name for each in parameters)}, whose meaning is not known")
    return _as_named(function, entropy, [{}], "entropy of tokens")


def _as_named(
    function: Callable[..., Any], expected: Callable[..., Tensor], calls: list[Call], name: str
) -> AsNamed | NotRead:
    with quiet_room():
        for call in calls:
            for dtype in (torch.float32, torch.bfloat16):
                if _distance(function, lambda each: expected(**each), call, dtype) > 1.0:
                    return NotRead(f"computes something else than the {name}")
    return AsNamed(name)


def _distance(
    function: Callable[..., Any], expected: Callable[[Call], Tensor], call: Call, dtype: torch.dtype
) -> float:
    ours, theirs = (values((BATCH, TOKENS, VOCABULARY), 1, dtype).requires_grad_() for _ in range(2))
    try:
        observed = function(**call, logits=theirs)
    except Exception as error:
        unless_accident(error)
        return float("inf")
    return distance([observed], [expected({**call, "logits": ours})], [theirs], [ours])


def _integers(numbers: Any) -> Tensor:
    return torch.tensor(numbers, device="cpu")
