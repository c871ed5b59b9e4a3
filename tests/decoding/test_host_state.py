"""Two looks at a model are equal as long as a captured step stands for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

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


def test_a_small_tensor_that_each_prefill_makes_anew_is_brought_to_its_address() -> None:
    model = tiny("qwen3")
    model.model.deltas = torch.tensor([1])
    before = observe(model, "cpu")
    model.model.deltas = torch.tensor([5])
    later = observe(model, "cpu")
    assert later.state == before.state
    assert before.changes_to(later)  # a step that does so is not captured
    before.renew(later)
    assert before.loose[0].tolist() == [5]


def test_weights_elsewhere_are_named() -> None:
    assert observe(tiny("qwen3"), "npu").why_not == "weights on cpu"
