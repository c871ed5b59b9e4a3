"""Values that wait, by what all kinds promise: looking on, using, and who is told."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch.waiting
from npu_patch.commands.replay.recording import recorded
from npu_patch.commands.replay.snapshot import snapshot
from npu_patch.ops.attention.band import CAUSAL_TOP_LEFT
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.ops.w8a8.quantised import by_token
from npu_patch.serving.calls import Calls
from npu_patch.waiting.contract import Abandoned, Waiting, materialised
from npu_patch.waiting.heads import Deferral, deferring
from npu_patch.waiting.logits import wait
from npu_patch.waiting.masks import Pattern, PatternMask
from npu_patch.waiting.origins import Origin
from npu_patch.waiting.quantised_norms import QuantisedNorm
from npu_patch.waiting.sums import Addition, DeferredBranch

X, RESIDUAL, MASK = torch.arange(6.0).view(2, 3), torch.full((2, 3), 0.5), torch.ones(1, 1, 4, 4).tril().bool()


@dataclass(frozen=True)
class Example:
    """`tensor`: what it stands for, None where that cannot be had. `said()`: who used it, as far as anybody is told.
    `taken()`: its partner takes it; None where one that takes it leaves it waiting for others."""

    value: Waiting
    tensor: Tensor | None
    said: Callable[[], str]
    taken: Callable[[], Any] | None


def heads() -> Example:
    norms = torch.nn.Identity(), torch.nn.Identity()
    deferral = Deferral(norms, lambda *_: pytest.fail("nothing is rotated"))
    value = deferral.defer(norms[0], torch.ones(1, 2, 3, 4), None, 1e-6, PLAIN_VARIANTS[0])

    def taken() -> None:
        with deferring(deferral):
            assert value.transpose(1, 2).x.shape == (1, 3, 2, 4)

    return Example(value, None, lambda: "", taken)


def branch() -> Example:
    told: list[str] = []
    value = DeferredBranch(X, Addition(lambda *_: "never", told.append))
    return Example(value, X, lambda: "; ".join(told), lambda: RESIDUAL + value)


def total() -> Example:
    told: list[str] = []
    value = RESIDUAL + DeferredBranch(X, Addition(lambda _, __, x, residual, *___: (x, residual + x), told.append))
    normed = lambda: value.normalized(torch.nn.Identity(), PLAIN_VARIANTS[0], None, 1e-6)  # noqa: E731
    return Example(value, RESIDUAL + X, lambda: "; ".join(told), normed)


def mask() -> Example:
    value = PatternMask(tuple(MASK.shape), MASK.device, Pattern(CAUSAL_TOP_LEFT), MASK.clone)
    return Example(value, MASK, lambda: repr(value).partition("written out for ")[2], None)


def logits() -> Example:
    told: list[str] = []
    value = wait(X, torch.eye(3), None, Origin(told.append))
    return Example(value, X, lambda: "; ".join(told), None)


def quantised_norm() -> Example:
    told: list[str] = []
    value = QuantisedNorm(RESIDUAL, by_token(X), lambda total: total - RESIDUAL + X, told.append)
    return Example(value, X, lambda: "; ".join(told), value.rows)


KINDS = (heads, branch, total, mask, logits, quantised_norm)
every_kind = pytest.mark.parametrize("make", KINDS)


def leaves(cls: type) -> Iterator[type]:
    below = [each for each in cls.__subclasses__() if each.__module__.startswith("npu_patch.waiting.")]
    for each in below:
        yield from leaves(each)
    if not below:
        yield cls


def test_every_kind_of_the_package_is_held_to_the_contract() -> None:
    for found in pkgutil.iter_modules(npu_patch.waiting.__path__, "npu_patch.waiting."):
        importlib.import_module(found.name)
    assert set(leaves(Waiting)) == {type(make().value) for make in KINDS}


@every_kind
def test_who_looks_on_leaves_it_waiting_and_is_not_counted(make: Callable[[], Example]) -> None:
    example = make()
    seen, copied = example.value.peek(), snapshot(example.value)
    assert not example.value.settled
    if example.tensor is None:
        assert seen is copied is None
    else:
        for each in (seen, copied):
            assert isinstance(each, Tensor) and torch.equal(materialised(each, "a test"), example.tensor)
    assert not example.value.settled and not example.said()


@every_kind
def test_who_uses_it_gets_the_tensor_of_the_original_and_is_named(make: Callable[[], Example]) -> None:
    example = make()
    if example.tensor is None:
        with pytest.raises(Abandoned, match=r"\(somebody\)"):
            example.value.materialise("somebody")
        assert example.value.settled
        return
    found = example.value.materialise("somebody")
    assert type(found) is Tensor and torch.equal(found, example.tensor)
    assert example.value.settled and "somebody" in example.said()
    assert example.value.materialise("somebody else") is found and "else" not in example.said()
    assert torch.equal(materialised(example.value.peek(), "a test"), example.tensor)


@every_kind
def test_what_torch_does_with_it_is_a_use(make: Callable[[], Example]) -> None:
    example = make()
    if example.tensor is None:
        with pytest.raises(Abandoned, match="softmax"):
            torch.nn.functional.softmax(example.value, dim=-1)
    else:
        given = (example.value, example.tensor)
        found, expected = (torch.nn.functional.softmax(each, dim=-1, dtype=torch.float32) for each in given)
        assert torch.equal(found, expected) and example.said()
    assert example.value.settled


@pytest.mark.parametrize("make", [make for make in KINDS if make().taken is not None])
def test_what_its_partner_took_waits_no_longer_and_nothing_is_said(make: Callable[[], Example]) -> None:
    example = make()
    example.taken()
    assert example.value.settled and not example.said()


def test_a_mask_that_is_read_keeps_its_pattern_and_one_that_is_written_to_does_not() -> None:
    value = mask().value
    value.materialise("attention")
    assert value.pattern is not None
    value.logical_and_(X.new_zeros((), dtype=torch.bool))
    assert value.pattern is None and not value.peek().any() and not snapshot(value).any()


def test_a_mask_that_is_written_to_with_a_sum_loses_its_pattern() -> None:
    """The sum hears of it first, and leaves the mask to torch."""
    value = mask().value
    value.logical_and_(DeferredBranch(torch.zeros(4, 4), Addition(lambda *_: "", lambda reason: None)))
    assert value.pattern is None and not value.any()


def test_a_mask_that_was_looked_at_is_apart_from_what_is_written_to_it_later() -> None:
    value = mask().value
    seen = value.peek()
    value.logical_and_(torch.zeros((), dtype=torch.bool))
    assert torch.equal(materialised(seen, "a test"), MASK) and not value.any()


class Next(Waiting):
    """A kind that nobody has heard of."""

    def __init__(self, tensor: Tensor | None) -> None:
        self.tensor, self.used_by = tensor, ""

    @property
    def settled(self) -> bool:
        return bool(self.used_by)

    def peek(self) -> Tensor | None:
        return self.tensor

    def materialise(self, used_by: str) -> Tensor:
        self.used_by = used_by
        if self.tensor is None:
            raise Abandoned(used_by)
        return self.tensor


@pytest.mark.parametrize("tensor", [X, None])
def test_a_recording_knows_no_kind(tensor: Tensor | None) -> None:
    calls, value = Calls(), Next(tensor)
    held: Any = SimpleNamespace(outcome=SimpleNamespace(calls=calls))
    with recorded([held]) as recording:
        assert calls.watch is not None and calls.watch((value, {"x": RESIDUAL}), {"none": None}) is False
    assert not value.settled
    kept = recording.of(held)
    assert len(kept) == (tensor is not None)
    for call in kept:
        assert torch.equal(call.args[0], X) and call.args[0] is not X and call.kwargs == {"none": None}


@pytest.mark.parametrize("wrapped", [lambda each: each, lambda each: [(each, 1)], lambda each: {"logits": each}])
def test_what_waits_within_something_is_made_there(wrapped: Callable[[Any], Any]) -> None:
    value = Next(X)
    assert repr(materialised(wrapped(value), "a test")) == repr(wrapped(X)) and value.used_by == "a test"
