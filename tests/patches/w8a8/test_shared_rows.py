"""Layers in a row share the quantisation of their input, and compute what each would by itself whoever changes it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import npu_patch
from npu_patch import simulator
from npu_patch.ops.w8a8 import shared_rows
from npu_patch.ops.w8a8.linear import rows_of
from npu_patch.ops.w8a8.quantised import Quantised
from tests.support.w8a8 import int8_layer

MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "with gradients": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}
WIDE = 64


class Heads(nn.Module):
    """Three layers of one input, the middle one within another module, and one of what they return."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (int8_layer(nn.Linear(WIDE, WIDE, dtype=torch.bfloat16)) for _ in range(4))
        self.around = nn.Sequential(self.k)

    def between(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        self.between(x)
        return self.o(q + self.around(x) * self.v(x))


class InPlace(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        x.mul_(0.5)
        return self.o(q + self.around(x) * self.v(x))


class OfAView(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        rows = x.view(-1, WIDE)
        rows += 1.0
        return self.o(q + self.around(x) * self.v(x))


class AsResult(Heads):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        torch.mul(x, 2.0, out=x)
        return self.o(q + self.around(x) * self.v(x))


class OtherMemory(Heads):
    def between(self, x: Tensor) -> None:
        x.data = x * 0.5


class InAFunction(Heads):
    def between(self, x: Tensor) -> None:
        x.neg_()


def halve_given(module: nn.Module, given: tuple[Tensor, ...], *result: Any) -> None:
    given[0].mul_(0.5)


def hooked(where: str, when: str) -> Callable[[], Heads]:
    def make() -> Heads:
        model = Heads()
        getattr(model.get_submodule(where), f"register_forward_{when}")(halve_given)
        return model

    return make


CHANGING: dict[str, Callable[[], Heads]] = {
    "by an operator in place": InPlace,
    "through a view": OfAView,
    "as the result of an operator": AsResult,
    "in a function": InAFunction,
    "by other memory": OtherMemory,
    "by a hook on the first": hooked("q", "hook"),
    "by a hook before the second": hooked("k", "pre_hook"),
    "by a hook before what has the second": hooked("around", "pre_hook"),
    "by a hook on what has the second": hooked("around", "hook"),
}


def given(npu: torch.device) -> Tensor:
    """Computed within the mode, or it would have a version."""
    return torch.randn(2, 5, WIDE, generator=torch.Generator().manual_seed(1)).to(npu, torch.bfloat16) * 1


def result(model: Heads, npu: torch.device, mode: str, **switches: Any) -> tuple[Tensor, int]:
    """Of the second call, and how often it quantised."""
    with npu_patch.applied(model, **switches), MODES[mode]():
        model(given(npu))
        x = given(npu)
        with simulator.count() as counted:
            y = model(x)
    return y.detach().clone(), counted.by_op.get("npu::npu_dynamic_quant", (0,))[0]


@pytest.mark.parametrize("mode", MODES)
def test_one_quantisation_serves_layers_of_one_input(mode: str, npu: torch.device) -> None:
    model = Heads().to(npu)
    expected, _ = result(model, npu, mode, w8a8=False)
    found, times = result(model, npu, mode)
    assert times == 2 and torch.equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("change", CHANGING)
def test_an_input_that_is_changed_between_is_quantised_anew(change: str, mode: str, npu: torch.device) -> None:
    model = CHANGING[change]().to(npu)
    expected, _ = result(model, npu, mode, w8a8=False)
    found, times = result(model, npu, mode)
    assert times > 2 and torch.equal(found, expected)


def test_the_first_call_of_a_model_shares_too(npu: torch.device) -> None:
    model = Heads().to(npu)
    with npu_patch.applied(model), simulator.count() as counted:
        model(given(npu))
    assert counted.by_op["npu::npu_dynamic_quant"][0] == 2


def test_another_dtype_of_autocast_is_another_quantisation(npu: torch.device) -> None:
    """Between the two calls of one input, outside of autocast and within."""
    q, k = (int8_layer(nn.Linear(WIDE, WIDE)).to(npu) for _ in range(2))
    x = torch.randn(2, 5, WIDE, generator=torch.Generator().manual_seed(1)).to(npu)  # bfloat16 rounds it
    with torch.no_grad(), npu_patch.applied(nn.Sequential(q, k), w8a8=False):
        expected = q(x)
        with torch.autocast("npu", torch.bfloat16):
            expected_half = k(x)
    with torch.no_grad(), npu_patch.applied(nn.Sequential(q, k)):
        assert torch.equal(q(x), expected)
        with torch.autocast("npu", torch.bfloat16):
            assert torch.equal(k(x), expected_half) and k(x).dtype == torch.bfloat16


def test_streams_share_nothing(npu: torch.device) -> None:
    """What one of them quantised, another may not read without waiting."""
    model, x = Heads().to(npu), given(npu)
    side = torch.npu.Stream()
    with npu_patch.applied(model), simulator.count() as counted:
        expected = model.k(x)
        model.q(x)
        side.wait_stream(torch.npu.current_stream())
        with torch.npu.stream(side):
            found = model.k(x)
    torch.npu.synchronize()
    assert counted.by_op["npu::npu_dynamic_quant"][0] == 2 and torch.equal(found, expected)


def test_threads_share_nothing(npu: torch.device) -> None:
    """Each with an input of its own, in turns: between two layers of one thread, the other's layers are called."""
    model = Heads().to(npu)
    inputs = [given(npu) * (index + 1) for index in range(2)]
    with torch.no_grad(), npu_patch.applied(model, w8a8=False):
        expected = [(model.q(x), model.k(x)) for x in inputs]
    found: list[list[Tensor]] = [[], []]
    turns = threading.Barrier(2)

    def run(index: int) -> None:
        with torch.no_grad():
            for layer in (model.q, model.k):
                turns.wait(30)
                found[index].append(layer(inputs[index]))

    with npu_patch.applied(model), simulator.count() as counted:
        threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert counted.by_op["npu::npu_dynamic_quant"][0] == 2
    assert all(
        torch.equal(*pair) for own, its in zip(found, expected, strict=True) for pair in zip(own, its, strict=True)
    )


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """What was quantised, as long as somebody has it."""
    seen: list[weakref.ref[Tensor]] = []

    def quantise(*given: Any) -> Quantised:
        rows = rows_of(*given)
        seen.append(weakref.ref(rows.values))
        return rows

    monkeypatch.setattr(shared_rows, "rows_of", quantise)
    return seen


@pytest.mark.parametrize("mode", ["with gradients", "no_grad"])
def test_nothing_of_it_is_kept_when_the_last_layer_was_called(
    mode: str, npu: torch.device, quantised: list[weakref.ref[Tensor]]
) -> None:
    """Though whoever called has the input still, and the graph is there; without the collector of cycles."""
    model = Heads().to(npu)
    x = given(npu).requires_grad_(mode == "with gradients")
    gc.disable()
    try:
        with npu_patch.applied(model), MODES[mode]():
            model(x)
            for layer in (model.q, model.k, model.v):
                layer(x)
            assert [each() for each in quantised if each() is not None] == []
            model.q(x)
            assert len([each for each in quantised if each() is not None]) == 1
            del x
            assert [each() for each in quantised if each() is not None] == []
    finally:
        gc.enable()
