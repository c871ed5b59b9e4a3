"""Losses without logits: the numbers and gradients of the whole, what is never made, one function whoever looks on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops import chunked_loss
from npu_patch.ops.chunked_loss import chosen, chunks, cross_entropy
from npu_patch.ops.head_products import Cast, Logits, Product, Scaled, Sum, Tanh, Term
from npu_patch.ops.log_normalizers import log_normalizers
from npu_patch.ops.token_losses import TOKEN_LOSSES, reference
from npu_patch.serving.implementation import TRITON
from tests.support.largest_tensor import Largest

ROWS, WIDTH, VOCABULARY = 75, 24, 133
Z = Callable[..., Any]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of rows, the last one shorter, and several of columns."""
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 32 * VOCABULARY)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x, weight, bias)


def capped(x: Tensor, weight: Tensor) -> Tensor:
    return torch.tanh(F.linear(x, weight) / 3.0) * 3.0


def scaled_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    z = F.linear(x, weight)
    return z.to(torch.promote_types(z.dtype, torch.float32)) * 0.7


def with_adapter(x: Tensor, weight: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """As peft adds it: in the adapter's dtype, rounded to the base's."""
    result = F.linear(x, weight)
    return (result + F.linear(low, up) * 2.0).to(result.dtype)


def _capped(terms: tuple[Term, ...]) -> Logits:
    return Logits(terms, Scaled(Tanh(Scaled(Product(), 3.0, divided=True)), 3.0))


HEADS: dict[str, tuple[Z, Z]] = {
    "plain": (plain, lambda x, weight: Logits((Term(x, weight),))),
    "bias": (plain, lambda x, weight, bias: Logits((Term(x, weight, bias),))),
    "capped": (capped, lambda x, weight: _capped((Term(x, weight),))),
    "scaled in float32": (
        scaled_in_float32,
        lambda x, weight: Logits((Term(x, weight),), Scaled(Cast(Product(), torch.float32), 0.7)),
    ),
    "adapter": (
        with_adapter,
        lambda x, weight, low, up: Logits(
            (Term(x, weight), Term(low, up)), Cast(Sum(Product(), Scaled(Product(1), 2.0)), x.dtype)
        ),
    ),
}


def tensors(head: str, dtype: torch.dtype, device: torch.device, frozen: bool = False) -> list[Tensor]:
    torch.manual_seed(3)
    x, weight = torch.randn(ROWS, WIDTH) * 2, torch.randn(VOCABULARY, WIDTH) / 3
    found = [x.to(dtype), weight.to(dtype)]
    if head == "bias":
        found.append(torch.randn(VOCABULARY).to(dtype))
    if head == "adapter":  # its own tensors are in float32
        found += [torch.randn(ROWS, 4), torch.randn(VOCABULARY, 4) / 4]
    frozen_ones = (weight.shape, (VOCABULARY,)) if frozen else ()
    return [each.to(device).requires_grad_(each.shape not in frozen_ones) for each in found]


def labels_of(device: torch.device, ignored: bool = True) -> Tensor:
    torch.manual_seed(4)
    labels = torch.randint(VOCABULARY, (ROWS,))
    if ignored:
        labels[::5] = -100
    return labels.to(device)


def in_float64(given: list[Tensor]) -> list[Tensor]:
    return [each.detach().double().cpu().requires_grad_(each.requires_grad) for each in given]


def gradients(loss: Tensor, given: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [each for each in given if each.requires_grad]))


def off(found: Tensor, exact: Tensor) -> float:
    found, exact = found.detach().double().cpu(), exact.detach().cpu()
    return float((found - exact).norm() / exact.norm())


def run_of(device: torch.device, interpreted: bool = False) -> Iterator[Any]:
    """Of each implementation; of Triton's kernel, which is slow in the interpreter, where asked for."""
    for each in TOKEN_LOSSES.implementations:
        if device.type in each.device_types and each.missing() is None and (interpreted or each.name != TRITON):
            yield each.run


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("divisor", [None, 41, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_loss_and_gradients_are_as_far_from_float64_as_those_of_whole_logits(
    head: str, dtype: torch.dtype, divisor: Any, smoothing: float, frozen: bool, npu: torch.device
) -> None:
    whole, in_chunks = HEADS[head]
    labels = labels_of(npu)
    divisor = torch.tensor(41, device=npu) if divisor == "tensor" else divisor

    def original(given: list[Tensor], full: torch.dtype) -> Tensor:
        z = whole(*given).to(full)
        at = labels.to(z.device)
        if divisor is None:
            return F.cross_entropy(z, at, label_smoothing=smoothing)
        return F.cross_entropy(z, at, reduction="sum", label_smoothing=smoothing) / float(divisor)

    exactly = in_float64(tensors(head, dtype, npu, frozen))
    exact_loss = original(exactly, torch.float64)
    exact = [exact_loss, *gradients(exact_loss, exactly)]
    theirs = tensors(head, dtype, npu, frozen)
    their_loss = original(theirs, torch.float32)
    allowed = [off(each, at) for each, at in zip([their_loss, *gradients(their_loss, theirs)], exact, strict=True)]
    for run in run_of(npu, interpreted=divisor == 41):
        ours = tensors(head, dtype, npu, frozen)
        loss = cross_entropy(in_chunks(*ours), labels, run, divisor=divisor, label_smoothing=smoothing)
        assert (loss.dtype, loss.shape, loss.device) == (their_loss.dtype, their_loss.shape, their_loss.device)
        found = gradients(loss, ours)
        for each, given in zip(found, [each for each in ours if each.requires_grad], strict=True):
            assert (each.dtype, each.shape) == (given.dtype, given.shape)
        for each, at, bar in zip([loss, *found], exact, allowed, strict=True):
            assert off(each, at) <= 1.1 * bar + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", HEADS)
def test_log_probabilities_and_entropy_are_as_far_from_float64_as_those_of_whole_logits(
    head: str, dtype: torch.dtype, npu: torch.device
) -> None:
    whole, in_chunks = HEADS[head]
    labels = labels_of(npu, ignored=False)
    torch.manual_seed(5)
    of_chosen, of_entropy = torch.rand(2, ROWS, dtype=torch.float64)

    def original(given: list[Tensor], full: torch.dtype) -> tuple[Tensor, Tensor]:
        z = whole(*given).to(full).log_softmax(-1)
        return z.gather(-1, labels.to(z.device)[:, None]).squeeze(-1), -(z.exp() * z).sum(-1)

    def results(found: tuple[Tensor, Tensor], given: list[Tensor]) -> list[Tensor]:
        weights = [each.to(found[0].device, found[0].dtype) for each in (of_chosen, of_entropy)]
        total = sum((each * weight).sum() for each, weight in zip(found, weights, strict=True))
        return [*found, *gradients(total, given)]

    exactly, theirs = in_float64(tensors(head, dtype, npu)), tensors(head, dtype, npu)
    exact = results(original(exactly, torch.float64), exactly)
    allowed = [off(*each) for each in zip(results(original(theirs, torch.float32), theirs), exact, strict=True)]
    for run in run_of(npu):
        ours = tensors(head, dtype, npu)
        found = results(chosen(in_chunks(*ours), labels, run, entropy=True), ours)
        for each, at, bar in zip(found, exact, allowed, strict=True):
            assert off(each, at) <= 1.1 * bar + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_log_normalizers_are_as_far_from_float64_as_those_of_whole_logits(
    head: str, dtype: torch.dtype, npu: torch.device
) -> None:
    whole, in_chunks = HEADS[head]

    def results(found: Tensor, given: list[Tensor]) -> list[Tensor]:
        return [found, *gradients(found.pow(2).mean(), given)]

    exactly, theirs, ours = in_float64(tensors(head, dtype, npu)), *(tensors(head, dtype, npu) for _ in range(2))
    exact = results(whole(*exactly).logsumexp(-1), exactly)
    allowed = [off(*each) for each in zip(results(whole(*theirs).float().logsumexp(-1), theirs), exact, strict=True)]
    with Largest() as largest:
        found = results(log_normalizers(in_chunks(*ours)), ours)
    assert largest.elements < ROWS * VOCABULARY
    for each, at, bar in zip(found, exact, allowed, strict=True):
        assert off(each, at) <= 1.1 * bar + 1e-6


def test_log_probabilities_alone_take_a_gradient_alone(npu: torch.device) -> None:
    given, labels = tensors("plain", torch.float32, npu), labels_of(npu, ignored=False)
    alone, nothing = chosen(HEADS["plain"][1](*given), labels.view(5, 15), reference)
    assert alone.shape == (5, 15) and nothing is None
    beside, entropy = chosen(HEADS["plain"][1](*given), labels, reference, entropy=True)
    of_entropy = torch.autograd.grad(entropy.sum(), given, retain_graph=True)
    assert all(torch.isfinite(each).all() for each in of_entropy)
    for each, other in zip(gradients(alone.sum(), given), gradients(beside.sum(), given), strict=True):
        assert torch.equal(each, other)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_neither_logits_nor_their_gradient_are_made(
    head: str, dtype: torch.dtype, frozen: bool, npu: torch.device
) -> None:
    given, labels = tensors(head, dtype, npu, frozen), labels_of(npu)
    with Largest() as largest:
        gradients(cross_entropy(HEADS[head][1](*given), labels, reference), given)
        log_probabilities, entropy = chosen(HEADS[head][1](*given), labels.clamp(min=0), reference, entropy=True)
        gradients((log_probabilities * entropy).sum(), given)
    assert largest.elements <= max(chunked_loss.ELEMENTS, VOCABULARY * WIDTH) < ROWS * VOCABULARY
    with Largest() as largest:
        gradients(F.cross_entropy(HEADS[head][0](*given).float(), labels), given)
    assert largest.elements >= ROWS * VOCABULARY


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_the_same_bits_with_gradients_and_without(head: str, dtype: torch.dtype, npu: torch.device) -> None:
    for run in run_of(npu, interpreted=head == "plain"):
        assert_the_same_bits(head, dtype, run, npu)


def assert_the_same_bits(head: str, dtype: torch.dtype, run: Any, npu: torch.device) -> None:
    labels = labels_of(npu)

    def both(given: list[Tensor]) -> list[Tensor]:
        return [
            cross_entropy(HEADS[head][1](*given), labels, run).detach(),
            *(each.detach() for each in chosen(HEADS[head][1](*given), labels.clamp(min=0), run, entropy=True)),
        ]

    wanted = both(tensors(head, dtype, npu))
    with torch.no_grad():
        without = both(tensors(head, dtype, npu))
    with torch.inference_mode():
        inferred = both([each.detach() for each in tensors(head, dtype, npu)])
    frozen = both(tensors(head, dtype, npu, frozen=True))
    with torch.autocast("npu", torch.bfloat16):
        under_autocast = both(tensors(head, dtype, npu))
    for others in (without, inferred, frozen, under_autocast):
        assert all(torch.equal(each, other) for each, other in zip(wanted, others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_head_costs_the_gradient_of_its_rows_alone(dtype: torch.dtype, npu: torch.device) -> None:
    given = tensors("bias", dtype, npu, frozen=True)
    with Largest() as largest:
        loss = cross_entropy(HEADS["bias"][1](*given), labels_of(npu), reference)
    assert largest.elements <= chunked_loss.ELEMENTS
    kept = [each.shape for each in loss.grad_fn.saved_tensors if each is not None]
    assert kept == [(ROWS, WIDTH), (ROWS,), (ROWS,)]
    with torch.no_grad():
        assert cross_entropy(HEADS["bias"][1](*given), labels_of(npu), reference).grad_fn is None


@pytest.mark.parametrize("factor", [0.25, 8.0])
def test_a_loss_that_is_scaled_afterwards_has_the_scaled_gradients(factor: float, npu: torch.device) -> None:
    given, labels = tensors("bias", torch.bfloat16, npu), labels_of(npu)
    loss = cross_entropy(HEADS["bias"][1](*given), labels, reference)
    once = torch.autograd.grad(loss, given, retain_graph=True)
    for scaled, each in zip(torch.autograd.grad(loss * factor, given), once, strict=True):
        assert torch.equal(scaled, each * factor)


def test_a_batch_without_a_token_is_as_the_original_has_it(npu: torch.device) -> None:
    given = tensors("plain", torch.float32, npu)
    loss = cross_entropy(HEADS["plain"][1](*given), torch.full((ROWS,), -100, device=npu), reference)
    assert math.isnan(float(loss.detach()))
    assert all(not each.any() for each in gradients(loss, given))


@pytest.mark.parametrize("what", [cross_entropy, lambda *call: chosen(*call)[0].sum()])
def test_a_second_derivative_is_refused(what: Z, npu: torch.device) -> None:
    given = tensors("plain", torch.float32, npu)
    loss = what(HEADS["plain"][1](*given), labels_of(npu, ignored=False), reference)
    (grad,) = torch.autograd.grad(loss, given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (loss + grad.square().sum()).backward()


def test_labels_of_another_number_are_refused(npu: torch.device) -> None:
    given = tensors("plain", torch.float32, npu)
    with pytest.raises(ValueError, match="74 labels for 75 rows"):
        cross_entropy(HEADS["plain"][1](*given), labels_of(npu)[1:], reference)


def test_chunks_are_alike_and_cover_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "ELEMENTS", 2**26)
    parts = chunks(4096, 151936)
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    assert (parts[0].start, parts[-1].stop) == (0, 4096)
    sizes = {part.stop - part.start for part in parts[:-1]}
    assert len(sizes) == 1 and sizes.pop() * 151936 <= 2**26
    assert chunks(5, 10**9) == [slice(0, 5)] and chunks(0, 10) == [slice(0, 0)]
