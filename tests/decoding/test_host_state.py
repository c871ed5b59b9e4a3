"""Two looks at a model are equal as long as a captured step stands for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import distribute_tensor

from npu_patch.decoding.host_state import observe
from tests.support.tiny_models import tiny


def first(model: Any) -> Any:
    return model.model.layers[0].mlp


CHANGES: dict[str, Callable[[Any], Any]] = {
    "an attribute": lambda model: setattr(first(model), "scale", 2.0),
    "a value within a list": lambda model: model.config.layer_types.__setitem__(0, "other"),
    "within a configuration": lambda model: setattr(model.config, "rms_norm_eps", 0.5),
    "the mode": lambda model: first(model).train(),
    "a module": lambda model: setattr(first(model), "act_fn", torch.nn.GELU()),
    "a name": lambda model: first(model).add_module("other", first(model)._modules.pop("act_fn")),
    "the storage": lambda model: setattr(first(model).gate_proj.weight, "data", first(model).gate_proj.weight.clone()),
    "a dtype": lambda model: first(model).to(torch.bfloat16),
    "a buffer": lambda model: setattr(model.model.rotary_emb, "inv_freq", model.model.rotary_emb.inv_freq.clone()),
    "the class's forward": lambda model: setattr(
        type(first(model)), "forward", lambda self, hidden: type(self).kept(self, hidden)
    ),
    "a forward of its own": lambda model: setattr(first(model), "forward", lambda hidden: hidden),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3")
    monkeypatch.setattr(type(first(model)), "forward", type(first(model)).forward)
    before = observe(model, "cpu")
    assert observe(model, "cpu").state == before.state and before.why_not is None
    CHANGES[change](model)
    assert observe(model, "cpu").state != before.state


def test_values_on_the_device_are_read_by_the_graph_itself() -> None:
    model = tiny("qwen3")
    before = observe(model, "cpu")
    with torch.no_grad():
        first(model).gate_proj.weight.mul_(2)
    later = observe(model, "cpu")
    assert later.state == before.state and not before.changes_to(later)


def test_another_tensor_at_an_attribute_is_another_state_and_nobody_s_tensor_is_written() -> None:
    model = tiny("qwen3")
    given = model.model.deltas = torch.tensor([1])
    before = observe(model, "cpu")
    model.model.deltas = torch.tensor([5])
    later = observe(model, "cpu")
    assert later.state != before.state and before.changes_to(later)
    assert given.tolist() == [1]


class Setting:
    def __init__(self, factor: float) -> None:
        self.factor = factor


def test_what_a_plain_object_of_a_layer_holds_is_looked_at() -> None:
    model = tiny("qwen3")
    first(model).setting = Setting(1.0)
    before = observe(model, "cpu")
    first(model).setting.factor = 2.0
    assert observe(model, "cpu").state != before.state


def test_a_function_in_the_place_of_one_that_is_gone_is_another() -> None:
    model = tiny("qwen3")
    states = []
    for factor in range(3):
        first(model).scale = lambda x, factor=factor: x * factor  # at the same address, more often than not
        states.append(observe(model, "cpu").state)
        del first(model).scale
    assert states[0] != states[1] != states[2]


def test_a_layer_whose_forward_somebody_wrapped_is_left_to_it() -> None:
    model = tiny("qwen3")
    layer = first(model)
    layer.forward = functools.wraps(layer.forward)(lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs))
    assert observe(model, "cpu").why_not == "a layer with a forward of its own"


def test_weights_elsewhere_are_named() -> None:
    assert observe(tiny("qwen3"), "npu").why_not == "weights on cpu"


def test_a_tensor_divided_among_devices_is_named_and_looked_at_without_its_memory() -> None:
    model = tiny("qwen3")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer, mesh = first(model).gate_proj, distributed.init_device_mesh("cpu", (1,))
        layer.weight = torch.nn.Parameter(distribute_tensor(layer.weight.detach(), mesh))
        before = observe(model, "cpu")
        assert before.why_not == "weights that are a DTensor" and observe(model, "cpu").state == before.state
    finally:
        distributed.destroy_process_group()
