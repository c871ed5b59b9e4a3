"""Layers that somebody took after they were made: named, whoever held the model, and when nobody holds it any more."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from tests.support.gradients import loss_and_gradients
from tests.support.tiny_models import tiny, tiny_batch


def modeling() -> types.ModuleType:
    return sys.modules["transformers.models.qwen3.modeling_qwen3"]


class TheirNorm(torch.nn.Module):
    """As twinkle's, which has no __init__ and is given to layers as their class."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def their_forward(self: torch.nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    return TheirNorm.forward(self, hidden_states)


def give_a_class(layer: torch.nn.Module) -> None:
    layer.__class__ = TheirNorm


def bind_a_forward(layer: torch.nn.Module) -> None:
    layer.forward = types.MethodType(their_forward, layer)  # as LLaMA-Factory, Liger and kernels do


WAYS = {"another class": (give_a_class, "TheirNorm"), "a forward of its own": (bind_a_forward, "their_forward")}


def taken(take: Callable[[torch.nn.Module], None], model: torch.nn.Module) -> None:
    for layer in [each for each in model.modules() if type(each) is modeling().Qwen3RMSNorm]:
        take(layer)


def trained(model: torch.nn.Module) -> None:
    loss_and_gradients(model, tiny_batch())
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def about_norms(report: Any) -> list[str]:
    return [line for line in report.warnings if line.startswith("rms_norm: ")]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [True, False], ids=["a model", "no model"])
def test_layers_taken_after_apply_are_counted_and_named(given: bool, way: str, npu: torch.device) -> None:
    take, name = WAYS[way]
    model = tiny("qwen3").to(npu) if given else None
    npu_patch.apply(model)
    model = model or tiny("qwen3").to(npu)
    assert not about_norms(npu_patch.report())
    taken(take, model)
    (line,) = about_norms(npu_patch.report())
    assert line.endswith(f"bound anew by {__name__}.{name} on 9 layers: this patch no longer runs there")
    npu_patch.restore()
    npu_patch.apply()
    assert not about_norms(npu_patch.report())


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_is_gone_when_its_script_ends_was_looked_at_before_its_first_step(
    way: str, npu: torch.device
) -> None:
    take, name = WAYS[way]
    tiny("qwen3")
    npu_patch.apply()
    model = tiny("qwen3").to(npu)
    taken(take, model)
    trained(model)
    del model
    gc.collect()
    (line,) = about_norms(npu_patch.report())
    assert f"{name} on 9 layers" in line


def test_layers_that_are_given_back_are_named_no_longer(npu: torch.device) -> None:
    npu_patch.apply()
    model = tiny("qwen3").to(npu)
    taken(bind_a_forward, model)
    trained(model)
    assert about_norms(npu_patch.report())
    for layer in model.modules():
        vars(layer).pop("forward", None)
    assert not about_norms(npu_patch.report())


def test_a_class_that_calls_ours_takes_nothing(npu: torch.device) -> None:
    """As wrappers that give layers a subclass, FSDP2's among them."""
    npu_patch.apply()
    model = tiny("qwen3").to(npu)

    class Bare(modeling().Qwen3RMSNorm):
        pass

    class Around(modeling().Qwen3RMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + 0

    norms = [each for each in model.modules() if type(each) is modeling().Qwen3RMSNorm]
    norms[0].__class__, norms[1].__class__ = Bare, Around
    loss_and_gradients(model, tiny_batch())
    report = npu_patch.report()
    assert not about_norms(report)
    assert [each.calls.ran for each in report if each.site.endswith("Qwen3RMSNorm.forward")] == [9]


def test_an_optimizer_that_is_compiled_steps_as_before(npu: torch.device) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.ones(3)
    npu_patch.apply()
    torch.compile(optimizer.step, backend="eager")()
    assert weight.tolist() == [0.5] * 3


def test_sites_that_one_tool_took_alike_are_one_line_with_those_in_use_first(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As ms-swift does it, for all families that it knows."""
    families = ("qwen2", "qwen3", "qwen3_moe")
    for family in families:
        tiny(family)
    npu_patch.apply()
    tiny("qwen3")
    for family in families:
        module = sys.modules[f"transformers.models.{family}.modeling_{family}"]
        norm = next(name for name in vars(module) if name.endswith("RMSNorm"))
        monkeypatch.setattr(module, norm, TheirNorm)
    (line,) = about_norms(npu_patch.report())
    assert line.startswith(f"rms_norm: {modeling().__name__}.Qwen3RMSNorm.forward and 2 more alike: its name is ")
