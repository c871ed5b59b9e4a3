"""The negative log-likelihood of a token, of logits that are there: what one chunk of a loss needs of an operator.

A call is logits `[N, V]`, float32, and labels `[N]` in [0, V), int64, for the losses `[N]` and the log-probabilities
`[N, V]`, which are the caller's: the gradient is made in their place. With a scale `[N]`, logits may be of any dtype,
and the second result is, in that, their gradient of the losses times the scale. No autograd: neither is differentiated.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from npu_patch.devices import ACCELERATORS
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import (
    HALF_DTYPES,
    TRITON,
    Implementation,
    is_plain,
    layout,
    needs_operators,
    needs_triton,
)
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

MOST_ROWS = 200_000
NPU_CROSS_ENTROPY = Operator("npu_cross_entropy_loss", ("reduction",))
Losses = tuple[Tensor, Tensor]
TokenLosses = Callable[..., Losses]


def reference(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> Losses:
    wide = logits.float() if logits.dtype in HALF_DTYPES else logits
    log_probabilities = wide.log_softmax(-1)
    losses = -log_probabilities.gather(-1, labels[:, None]).squeeze(-1)
    return losses, _second(log_probabilities, labels, scale, logits.dtype)


def _npu_cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> Losses:
    # Without ignore_index, which the documented operator has only for labels that there are.
    losses, log_probabilities, _, _ = torch.ops.npu.npu_cross_entropy_loss(logits.float(), labels, reduction="none")
    return losses, _second(log_probabilities, labels, scale, logits.dtype)


def _second(log_probabilities: Tensor, labels: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return log_probabilities if scale is None else of_logits(log_probabilities, labels, scale).to(dtype)


def _triton_cross_entropy(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> Losses:
    from npu_patch.kernels.cross_entropy import cross_entropy

    return cross_entropy(logits, labels, scale)


IN_ONE_PASS = (_triton_cross_entropy,)  # the losses and the gradient


def of_logits(
    log_probabilities: Tensor,
    labels: Tensor,
    scale: Tensor,
    start: int | None = None,
    smoothing: float = 0.0,
    vocabulary: int = 1,
) -> Tensor:
    """The gradient of the logits, in the place of their log-probabilities `[n, v]`, of losses times `scale` `[n]`.
    `start`: they are a block of columns from there on; else all columns, and each label is one of them."""
    of_label = scale * (smoothing - 1)
    if start is not None:
        labels = labels - start
        inside = (labels >= 0) & (labels < log_probabilities.shape[-1])
        of_label = torch.where(inside, of_label, 0.0)
        labels = labels.clamp(0, log_probabilities.shape[-1] - 1)
    grad = log_probabilities.exp_().mul_(scale[:, None])
    grad.scatter_add_(-1, labels[:, None], of_label[:, None])
    return grad.sub_((scale * (smoothing / vocabulary))[:, None]) if smoothing else grad


def _unsupported(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> str | None:
    if not is_plain(logits) or not (scale is not None or logits.dtype == torch.float32) or logits.numel() == 0:
        return f"logits of {logits.dtype}, {layout(logits)}"
    return None


def _unsupported_by_npu(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> str | None:
    """Limits of npu_cross_entropy_loss (operator documentation)."""
    if logits.shape[0] > MOST_ROWS:
        return f"more than {MOST_ROWS} rows in a chunk"
    return _unsupported(logits, labels, scale)


def _key(logits: Tensor, labels: Tensor, scale: Tensor | None = None) -> Hashable:
    return logits.shape[-1], logits.dtype


TOKEN_LOSSES = Op(
    "cross_entropy",
    (
        Implementation(TRITON, ACCELERATORS, _triton_cross_entropy, _unsupported, needs_triton, optional=True),
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
        if not (isinstance(found, tuple) and isinstance(found[0], Tensor)):
            return found
        scale = torch.linspace(0.5, 1.5, rows, dtype=logits.dtype, device=logits.device)
        again, gradient = function(logits, labels, scale)
        return torch.cat((found[0][:, None], found[1], again[:, None], gradient), -1)

    inputs = lambda tokens: [((tokens, vocabulary), torch.float32)]  # noqa: E731
    return Case(TOKEN_LOSSES, f"{vocabulary} float32", inputs, call, differentiated=False)
