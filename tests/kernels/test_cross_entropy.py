"""Losses, gradients and log-probabilities of logits in the interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.kernels.cross_entropy import cross_entropy
from tests.kernels.exactness import ONE_MACHINE, normal
from tests.support.gradients import relative_error

pytestmark = pytest.mark.usefixtures("machine")
ROUNDED = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def exact(logits: Tensor, labels: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wide = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(wide, labels, reduction="none")
    (gradient,) = torch.autograd.grad((losses * scale.double()).sum(), wide)
    return losses.detach(), gradient, wide.detach().log_softmax(-1)


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("shape", [(1, 2), (7, 100), (3, 2_000)], ids=str)
def test_losses_gradient_and_log_probabilities(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, rows = 3 * normal(*shape, dtype=dtype).detach(), shape[0]
    labels = torch.arange(rows) * (shape[1] - 1) // max(rows - 1, 1)  # the first and the last of the vocabulary too
    scale = torch.linspace(0.0, 2.0, rows)
    losses, gradient, log_probabilities = exact(logits, labels, scale)
    found = cross_entropy(logits, labels, scale)
    alone = cross_entropy(logits, labels)
    assert (found[1].dtype, alone[1].dtype) == (dtype, torch.float32)
    assert relative_error(found[0], losses) < 1e-6 and torch.equal(found[0], alone[0])
    if scale.any():
        assert relative_error(found[1], gradient) < ROUNDED[dtype]
    assert relative_error(alone[1], log_probabilities) < 1e-6


@ONE_MACHINE
def test_rows_that_lie_apart() -> None:
    logits, labels, scale = normal(4, 3 * 50).detach()[:, 50:100], torch.tensor([0, 49, 3, 3]), torch.ones(4)
    for found, wanted in zip(cross_entropy(logits, labels, scale), exact(logits, labels, scale), strict=False):
        assert relative_error(found, wanted) < 1e-6


@ONE_MACHINE
@pytest.mark.parametrize("masked", [slice(0, 900), slice(900, 2_000), slice(1, 2_000)], ids=str)
def test_words_that_are_masked_have_no_share(masked: slice) -> None:
    logits = normal(2, 2_000).detach()
    logits[:, masked] = float("-inf")
    labels = torch.tensor([0, 0]) if masked.start else torch.tensor([900, 1_999])
    losses, gradient, _ = exact(logits, labels, torch.ones(2))
    found = cross_entropy(logits, labels, torch.ones(2))
    assert torch.allclose(found[0].double(), losses, atol=1e-6) and not found[1][:, masked].any()
    assert torch.allclose(found[1].double(), gradient, atol=1e-7)


@ONE_MACHINE
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_seen(value: float) -> None:
    logits = normal(2, 300).detach()
    logits[0, 7] = value
    losses, gradient = cross_entropy(logits, torch.tensor([1, 1]), torch.ones(2))
    assert losses.isnan().tolist() == [True, False] and gradient.isnan().any(-1).tolist() == [True, False]


@ONE_MACHINE
@pytest.mark.parametrize("label", [-1, 300, 2**31, 2**31 + 5, -(2**40)])
def test_a_label_that_is_none_of_the_vocabulary_is_seen_and_reads_nothing(label: int) -> None:
    losses, gradient = cross_entropy(normal(2, 300).detach(), torch.tensor([label, 1]), torch.ones(2))
    assert losses.isnan().tolist() == [True, False]
    assert gradient[0].isnan().all() and not gradient[1].isnan().any()
