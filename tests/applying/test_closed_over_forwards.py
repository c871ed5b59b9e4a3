"""Layers whose forward is a function of others that closes over the class's own, as transformers' tensor parallelism
binds it to the norms of heads: theirs runs, and within it the replacement."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState

import npu_patch
from npu_patch.sites.sites import bound_forward
from tests.support.gradients import loss_and_gradients
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch


def closing(layer: torch.nn.Module, heard: list[Any]) -> None:
    original = layer.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        heard.append(layer)
        return original(*args, **kwargs)

    layer.forward = theirs


def decorating(layer: torch.nn.Module, heard: list[Any]) -> None:
    original = layer.forward

    @functools.wraps(original)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        heard.append(layer)
        return original(*args, **kwargs)

    layer.forward = theirs


def twice(layer: torch.nn.Module, heard: list[Any]) -> None:
    closing(layer, [])
    closing(layer, heard)


def as_method(layer: torch.nn.Module, heard: list[Any]) -> None:
    original = layer.forward

    def theirs(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        heard.append(self)
        return original(*args, **kwargs)

    layer.forward = types.MethodType(theirs, layer)


def decorated_method(layer: torch.nn.Module, heard: list[Any]) -> None:
    """What it says of itself is that it is the class's forward."""
    as_method(layer, heard)
    functools.update_wrapper(layer.forward.__func__, type(layer).forward)


class Around:
    """As accelerate keeps the function of a forward that autocast wraps."""

    def __init__(self, function: Any, heard: list[Any]) -> None:
        self.function, self.heard = function, heard
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.heard.append(self)
        return self.function(*args, **kwargs)


def in_an_object(layer: torch.nn.Module, heard: list[Any]) -> None:
    around = Around(layer.forward.__func__, heard)
    layer.forward = types.MethodType(functools.wraps(around)(lambda *args, **kwargs: around(*args, **kwargs)), layer)


Wrap = Callable[[torch.nn.Module, list[Any]], None]


def norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [layer for layer in model.modules() if type(layer).__name__ == "Qwen3RMSNorm"]


@pytest.mark.parametrize("wrap", [closing, decorating, twice, as_method, decorated_method, in_an_object])
def test_what_they_close_over_is_served_and_put_back(wrap: Wrap, npu: torch.device) -> None:
    model, heard = tiny("qwen3").to(npu), []
    expected = loss_and_gradients(copy.deepcopy(model), tiny_batch())
    norms = norms_of(model)
    for norm in norms:
        wrap(norm, heard)
    before = [vars(norm)["forward"] for norm in norms]
    for _ in range(2):
        report = npu_patch.apply(model)
        heard.clear()
        found = loss_and_gradients(model, tiny_batch())
        assert apart(found, expected) == {}
        assert len(heard) == len(norms)
        (site,) = [o for o in report if o.patch == "rms_norm"]
        assert (site.status, site.layers, site.calls.ran) == ("patched", len(norms), len(norms))
        assert [vars(norm)["forward"] for norm in norms] == before
        npu_patch.restore()
        loss_and_gradients(model, tiny_batch())
        assert site.calls.ran == len(norms)  # nothing of ours runs after restore()
    assert {id(inner(norm)) for norm in norms} == {id(type(norm).forward) for norm in norms}


def inner(norm: torch.nn.Module) -> Any:
    """The class's own forward, as their function closes over it."""
    function = vars(norm)["forward"]
    function = getattr(function, "__func__", function)
    while True:
        held = [cell.cell_contents for cell in function.__closure__]
        if isinstance(held[0], Around):
            return held[0].function
        bound = [each for each in held if isinstance(each, types.MethodType)]
        if bound:
            return bound[0].__func__
        (function,) = [each for each in held if isinstance(each, types.FunctionType)]


def test_what_closes_over_another_layers_forward_is_left_alone(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    first, second = (layer.input_layernorm for layer in model.model.layers)
    stolen = types.MethodType(type(first).forward, second)  # with the other's weight
    first.forward = lambda hidden_states: stolen(hidden_states)
    expected = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model)
    found = loss_and_gradients(model, tiny_batch())
    assert apart(found, expected) == {}
    assert [o.layers for o in report.skipped if "lambda" in o.reason] == [1]


@pytest.fixture
def no_accelerator_yet() -> Iterator[None]:
    """What an Accelerator is asked for first stands for the process: a Trainer of another test may have asked."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("no_accelerator_yet")
def test_autocast_of_accelerate_stays_where_the_model_is_patched_after_it(npu: torch.device) -> None:
    model = accelerate.Accelerator(mixed_precision="bf16").prepare(tiny("qwen3"))
    expected = loss_and_gradients(model, tiny_batch())
    npu_patch.apply(model)
    dtypes: list[torch.dtype] = []
    handle = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    found = loss_and_gradients(model, tiny_batch())
    handle.remove()
    assert dtypes == [torch.bfloat16]
    assert abs(found["loss"] - expected["loss"]) < 1e-2 * expected["loss"]


def test_what_keeps_another_layers_forward_does_not_lead_into_the_class(npu: torch.device) -> None:
    """A method of another instance, whose decorators close over the function that they decorate."""

    class Decorated(torch.nn.Module):
        def plain(self, x: torch.Tensor) -> torch.Tensor:
            return x

    def closes_over(function: Any) -> Any:
        return functools.wraps(function)(lambda self, x: function(self, x))

    Decorated.forward = closes_over(Decorated.plain)
    layer, other = Decorated(), Decorated()
    stolen = other.forward
    layer.forward = lambda x: stolen(x)
    found = bound_forward(layer, (Decorated.forward,))
    assert found is not None and not found.reachable


def test_a_name_that_is_not_bound_yet_is_no_forward(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    norm = model.model.norm

    def theirs(hidden_states: torch.Tensor) -> torch.Tensor:
        return later(hidden_states)

    norm.forward = theirs
    npu_patch.apply(model)
    later = types.MethodType(type(norm).forward, norm)
    assert torch.isfinite(loss_and_gradients(model, tiny_batch())["loss"])
