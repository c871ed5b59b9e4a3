"""Adapters that train without a gradient are named, whether npu_patch can mend them or not."""

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import npu_patch
from npu_patch.applying.lost_gradients import cutting


def rounded(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        x = (x * 8).round() / 8
    return nn.functional.linear(x, self.weight, self.bias)


class Two(nn.Module):
    def __init__(self, rounding: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        for layer in (self.first, self.second) if rounding else ():
            layer.forward = types.MethodType(rounded, layer)
            layer.quantization_scheme = types.SimpleNamespace(input_activations=object())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x))


def adapted(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["first"], init_lora_weights=False, r=2))


def a_step(model: nn.Module) -> None:
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    result = model(torch.randn(3, 8)).sum()
    if result.requires_grad:
        result.backward()
    optimizer.step()


def test_adapters_that_get_no_gradient_are_named_at_once_and_before_the_first_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = adapted(Two(rounding=True))
    with npu_patch.applied(model, device="cpu") as report:
        assert any("2 layers have inputs that compressed-tensors rounds" in line for line in report.warnings)
        a_step(model)
        a_step(model)
    said = [each.getMessage() for each in caplog.records if "have no gradient" in each.getMessage()]
    assert len(said) == 1
    assert "2 of 2 trained parameters have no gradient (base_model.model.first.lora_A" in said[0]


def test_before_there_are_adapters_it_is_a_note_and_the_first_step_is_asked(caplog: pytest.LogCaptureFixture) -> None:
    model = Two(rounding=True).requires_grad_(False)
    with npu_patch.applied(model, device="cpu") as report:
        assert any("compressed-tensors rounds" in line for line in report.notes)
        assert not any("compressed-tensors rounds" in line for line in report.warnings)
        adapted(model)
        a_step(model)
    assert any("2 of 2 trained parameters have no gradient" in each.getMessage() for each in caplog.records)


def test_a_model_that_passes_gradients_on_is_not_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(Two(rounding=False))
    assert not cutting(model)
    with npu_patch.applied(model, device="cpu") as report:
        a_step(model)
        assert not any("gradient" in line for line in [*report.notes, *report.warnings])
    assert not any("gradient" in each.getMessage() for each in caplog.records)


def test_nothing_asks_once_it_is_undone(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(Two(rounding=True))
    with npu_patch.applied(model, device="cpu"):
        pass
    caplog.clear()
    a_step(model)
    assert not caplog.records
