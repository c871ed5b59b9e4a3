"""The negative log-likelihood of a token, of logits that are there: what one chunk of a loss needs of an operator.

A call is logits `[N, V]`, float32, and labels `[N]` in [0, V), int64, for the losses `[N]` and the log-probabilities
`[N, V]`, which are the caller's: the gradient is made in their place. No autograd: neither is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from npu_patch.serving.case import Case
from npu_patch.serving.implementation import Implementation, is_plain, layout, needs_operators
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

MOST_ROWS = 200_000
NPU_CROSS_ENTROPY = Operator("npu_cross_entropy_loss", ("reduction",))
Losses = tuple[Tensor, Tensor]
TokenLosses = Callable[[Tensor, Tensor], Losses]


def reference(logits: Tensor, labels: Tensor) -> Losses:
    log_probabilities = logits.log_softmax(-1)
    return -log_probabilities.gather(-1, labels[:, None]).squeeze(-1), log_probabilities


def _npu_cross_entropy(logits: Tensor, labels: Tensor) -> Losses:
    # Without ignore_index, which the documented operator has only for labels that there are.
    losses, log_probabilities, _, _ = torch.ops.npu.npu_cross_entropy_loss(logits, labels, reduction="none")
    return losses, log_probabilities


def _unsupported(logits: Tensor, labels: Tensor) -> str | None:
    if not is_plain(logits) or logits.dtype != torch.float32 or logits.numel() == 0:
        return f"logits of {logits.dtype}, {layout(logits)}"
    return None


def _unsupported_by_npu(logits: Tensor, labels: Tensor) -> str | None:
    """Limits of npu_cross_entropy_loss (operator documentation)."""
    if logits.shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows in a chunk"
    return _unsupported(logits, labels)


def _key(logits: Tensor, labels: Tensor) -> Hashable:
    return logits.shape[-1], logits.dtype


TOKEN_LOSSES = Op(
    "cross_entropy",
    (
        Implementation(
            "torch_npu.npu_cross_entropy_loss",
            ("npu",),
            _npu_cross_entropy,
            _unsupported_by_npu,
            needs_operators(NPU_CROSS_ENTROPY),
        ),
        Implementation("torch, log_softmax", ("npu", "cuda", "cpu"), reference, _unsupported),
    ),
    _key,
    reference,
)


def case(vocabulary: int) -> Case:
    """Results are put side by side: a `Case` has one."""

    def call(function: Callable[..., Any], *inputs: Tensor) -> Any:
        (logits,) = inputs
        rows = logits.shape[0]
        labels = torch.arange(rows, device=logits.device) * (vocabulary - 1) // max(rows - 1, 1)
        found = function(logits, labels)
        computed = isinstance(found, tuple) and isinstance(found[0], Tensor)
        return torch.cat((found[0][:, None], found[1]), -1) if computed else found

    inputs = lambda tokens: [((tokens, vocabulary), torch.float32)]  # noqa: E731
    return Case(TOKEN_LOSSES, f"{vocabulary} float32", inputs, call, differentiated=False)
