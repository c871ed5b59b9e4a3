"""Whether a function is the cross entropy of logits, with smoothed labels or without, or takes the log-probabilities of
tokens or their entropy."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
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
LABELS = (3, 0, NO_LABEL, 6, 2, 1)
INDEX = ((3, 0, 2, 6, 2, 1), (5, 3, 3, 1, 0, 4))
NUMBER, IGNORED = "num_items_in_batch", "ignore_index"
Call = Mapping[str, Any]


def cross_entropy(
    source: Tensor, target: Tensor, num_items_in_batch: Any = None, ignore_index: int = NO_LABEL, **others: Any
) -> Tensor:
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(source, target, ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


@quiet_room()
def read_cross_entropy(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(source, target)`, as transformers' `fixed_cross_entropy`, which its losses call with float32 logits:
    over targets that are not `ignore_index`, divided by `num_items_in_batch` if that is given."""
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    if names[:4] != ("source", "target", NUMBER, IGNORED):
        return NotRead(f"takes {', '.join(names)}, whose meaning is not known")
    calls: list[Call] = [
        {},
        {NUMBER: 5},
        {NUMBER: _integers(3)},
        {IGNORED: 3, "target": _integers(INDEX[0])},
    ]
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):  # none of which may matter
        others = {"weight": values((VOCABULARY,), 5).exp(), "label_smoothing": 0.3, "reduction": "none"}
        calls.append({name: value for name, value in others.items() if name not in parameters})
    target: dict[str, Any] = {"target": _integers(LABELS)}
    shape = (TOKENS, VOCABULARY)
    return _as_named(function, cross_entropy, [{**target, **call} for call in calls], "cross entropy", "source", shape)


EPSILON, SHIFTED = "epsilon", "shift_labels"


def logits_among(outputs: Any) -> Any:
    return outputs["logits"] if isinstance(outputs, dict) else outputs[0]


def smoothed_cross_entropy(
    epsilon: float,
    ignore_index: int,
    model_output: Any,
    labels: Tensor,
    shift_labels: bool = False,
    num_items_in_batch: Any = None,
) -> Tensor:
    logits = logits_among(model_output)
    if shift_labels:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    each, ignored = -logits.log_softmax(-1), labels == ignore_index
    of_label = each.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(ignored, 0.0).sum()
    of_all = each.sum(-1, dtype=torch.float32).masked_fill(ignored, 0.0).sum() / logits.shape[-1]
    number = (~ignored).sum() if num_items_in_batch is None else num_items_in_batch
    return (1 - epsilon) * (of_label / number) + epsilon * (of_all / number)


@quiet_room()
def read_label_smoothing(smoother: Any, function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(smoother(epsilon, ignore_index), model_output, labels)`, as `__call__` of transformers'
    `LabelSmoother`: the cross entropy over labels that are not ignored, of which a share is spread over the
    vocabulary."""
    names = tuple(inspect.signature(function).parameters)[1:]
    if names[:2] != ("model_output", "labels") or not set(names[2:]) <= {SHIFTED, NUMBER}:
        return NotRead(f"takes {', '.join(names)}, whose meaning is not known")
    labels = _integers((LABELS, INDEX[1]))
    differing: list[Call] = [{}, {IGNORED: 3}, {EPSILON: 0.0}]
    if SHIFTED in names:
        differing.append({SHIFTED: True})
    if NUMBER in names:
        differing += [{NUMBER: 5}, {NUMBER: _integers(3)}]
    calls: list[Call] = [{EPSILON: 0.3, IGNORED: NO_LABEL, "labels": labels, **call} for call in differing]

    def called(in_dict: bool) -> Callable[..., Any]:
        def call(epsilon: float, ignore_index: int, logits: Tensor, **others: Any) -> Any:
            outputs = {"loss": None, "logits": logits} if in_dict else (logits, None)
            return function(smoother(epsilon=epsilon, ignore_index=ignore_index), outputs, **others)

        return call

    def expected(logits: Tensor, **others: Any) -> Tensor:
        return smoothed_cross_entropy(model_output=(logits,), **others)

    found = [
        _as_named(called(in_dict), expected, calls, "cross entropy of smoothed labels") for in_dict in (True, False)
    ]
    return next((each for each in found if isinstance(each, NotRead)), found[0])


TEMPERATURE, ROW_MASK = "temperature", "row_mask"


def log_probabilities(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    found = (logits / temperature).log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return found if row_mask is None else found.masked_fill(row_mask == 0, 0.0)


def entropy(logits: Tensor) -> Tensor:
    each = logits.log_softmax(-1)
    return -(each.exp() * each).sum(-1)


@quiet_room()
def read_log_probabilities(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(logits, index)`, as trl's `selective_log_softmax`."""
    names = tuple(inspect.signature(function).parameters)
    if names[:2] != ("logits", "index") or not set(names[2:]) <= {TEMPERATURE, ROW_MASK}:
        return NotRead(f"takes {', '.join(names)}, whose meaning is not known")
    index: dict[str, Any] = {"index": _integers(INDEX)}
    calls: list[Call] = [index]
    if TEMPERATURE in names:
        calls.append(index | {TEMPERATURE: 0.7})
    if ROW_MASK in names:
        calls.append(index | {ROW_MASK: _integers(INDEX) % 2})
    return _as_named(function, log_probabilities, calls, "log-probabilities of tokens")


@quiet_room()
def read_entropy(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Of `function(logits)`, as trl's `entropy_from_logits`."""
    parameters = list(inspect.signature(function).parameters.values())
    if parameters[0].name != "logits" or not all(each.name == "chunk_size" for each in parameters[1:]):
        return NotRead(f"takes {', '.join(each.name for each in parameters)}, whose meaning is not known")
    return _as_named(function, entropy, [{}], "entropy of tokens")


def _as_named(
    function: Callable[..., Any],
    expected: Callable[..., Tensor],
    calls: list[Call],
    name: str,
    logits: str = "logits",
    shape: tuple[int, ...] = (BATCH, TOKENS, VOCABULARY),
) -> AsNamed | NotRead:
    for call in calls:
        for dtype in (torch.float32, torch.bfloat16):
            ours, theirs = (values(shape, 1, dtype).requires_grad_() for _ in range(2))
            try:
                observed = function(**call, **{logits: theirs})
            except Exception as error:
                unless_accident(error)
                return NotRead(f"cannot be called as the {name} is: {type(error).__name__}: {error}"[:160])
            if distance([observed], [expected(**call, **{logits: ours})], [theirs], [ours]) > 1.0:
                return NotRead(f"computes something else than the {name}")
    return AsNamed(name)


def _integers(numbers: Any) -> Tensor:
    return torch.tensor(numbers, device="cpu")
