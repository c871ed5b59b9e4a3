"""Models that somebody else patched: Liger (stand-ins that assign as its code does; its kernels need triton) and hub
kernels. What they put in place stays and is said, the rest is patched, and restore() takes nothing of theirs."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from tests.support.gradients import loss_and_gradients
from tests.support.parity import apart
from tests.support.tiny_models import tiny, tiny_batch


class LigerRMSNorm(torch.nn.Module):
    """As liger_kernel.transformers.rms_norm: a kernel that does not take CPU tensors."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = torch.nn.Parameter(torch.ones(hidden_size)), eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.device.type == "cpu":
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        x = hidden_states.float()
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)).to(
            hidden_states.dtype
        )


def liger_swiglu_forward(self: torch.nn.Module, x: Tensor) -> Tensor:
    return self.down_proj(torch.nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class LigerSwiGLUMLP(torch.nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        for name in ("gate_proj", "up_proj"):
            self.add_module(name, torch.nn.Linear(config.hidden_size, config.intermediate_size, bias=False))
        self.down_proj = torch.nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
        return liger_swiglu_forward(self, x)


def patched_by_liger(model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch, swiglu: bool = True) -> torch.nn.Module:
    """As liger_kernel.transformers.monkey_patch 0.8.5 does with an instance: its classes under the modeling file's
    names, and methods bound on each layer."""
    modeling = sys.modules["transformers.models.qwen3.modeling_qwen3"]
    monkeypatch.setattr(modeling, "Qwen3RMSNorm", LigerRMSNorm)
    if swiglu:
        monkeypatch.setattr(modeling, "Qwen3MLP", LigerSwiGLUMLP)
    for layer in model.modules():
        if type(layer).__name__ == "Qwen3RMSNorm":
            layer.forward = types.MethodType(LigerRMSNorm.forward, layer)
        elif type(layer).__name__ == "Qwen3MLP" and swiglu:
            layer.forward = types.MethodType(liger_swiglu_forward, layer)
    return model


def test_ligers_instance_patches_stay_and_are_said(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_by_liger(tiny("qwen3").to(npu), monkeypatch)
    expected = loss_and_gradients(model, tiny_batch())
    forwards = {name: layer.forward for name, layer in model.named_modules() if "forward" in vars(layer)}
    report = npu_patch.apply(model)
    found = loss_and_gradients(model, tiny_batch())
    assert {name: vars(model.get_submodule(name))["forward"] for name in forwards} == forwards
    assert {"nothing in Qwen3ForCausalLM is served" in line for line in report.warnings} == {True}
    said = {(o.patch, o.layers): o.reason for o in report.skipped if o.layers}
    assert "LigerRMSNorm.forward, which hides the class's" in said["rms_norm", len(forwards) - 2]
    assert "liger_swiglu_forward, which hides the class's" in said["swiglu", 2]
    assert {o.patch for o in report.patched if o.calls.ran} == {"rope", "attention", "cross_entropy"}
    assert apart(found, expected) == {}
    npu_patch.restore()
    assert {name: vars(model.get_submodule(name))["forward"] for name in forwards} == forwards


@pytest.mark.parametrize("first", [False, True])
def test_restore_gives_back_what_liger_displaced(
    first: bool, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that lose Liger's methods later run the class's own forward, patched until then, whoever came first."""
    model = tiny("qwen3").to(npu)
    expected = loss_and_gradients(model, tiny_batch())
    cls, forward = type(model.model.norm), type(model.model.norm).forward
    if first:
        npu_patch.apply(model)
    patched_by_liger(model, monkeypatch)
    report = npu_patch.apply(model)
    assert cls.forward is not forward
    for layer in model.modules():
        vars(layer).pop("forward", None)
    found = loss_and_gradients(model, tiny_batch())
    assert {"rms_norm", "swiglu"} <= {o.patch for o in report.patched if o.calls.ran}
    assert apart(found, expected) == {}
    npu_patch.restore()
    assert cls.forward is forward


def test_what_liger_leaves_alone_is_patched(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = patched_by_liger(tiny("qwen3").to(npu), monkeypatch, swiglu=False)
    report = npu_patch.apply(model)
    loss_and_gradients(model, tiny_batch())
    assert {o.patch for o in report.patched if o.calls.ran} == {"swiglu", "rope", "attention", "cross_entropy"}


def test_ligers_classes_are_probed_and_left_with_a_reason(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is made, Liger puts its class in the place of the modeling file's."""
    tiny("qwen3")
    modeling = sys.modules["transformers.models.qwen3.modeling_qwen3"]
    monkeypatch.setattr(modeling, "Qwen3RMSNorm", LigerRMSNorm)
    monkeypatch.setattr(modeling.Qwen3MLP, "forward", liger_swiglu_forward)
    model = tiny("qwen3").to(npu)
    assert isinstance(model.model.norm, LigerRMSNorm)
    expected = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model)
    found = loss_and_gradients(model, tiny_batch())
    reasons = [o.reason for o in report.skipped if o.site.endswith("LigerRMSNorm.forward")]
    assert len(reasons) == 1 and reasons[0]
    assert LigerRMSNorm.forward.__qualname__ == "LigerRMSNorm.forward" and not hasattr(
        LigerRMSNorm.forward, "__wrapped__"
    )
    assert apart(found, expected) == {}


def test_hub_kernels_are_said(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    model._use_kernels = True  # `use_kernels=True` sets it, and fetches kernels from the hub
    norm = model.model.norm
    norm.forward = types.MethodType(LigerRMSNorm.forward, norm)  # `kernelize` binds a forward to each layer
    bound = norm.forward
    report = npu_patch.apply(model)
    (line,) = [each for each in report.warnings if "hub kernels" in each]
    assert (
        line.startswith("the model has hub kernels, which stay wherever they are bound") and "use_kernels=False" in line
    )
    assert norm.forward is bound
    assert [o.layers for o in report.skipped if "LigerRMSNorm.forward" in o.reason] == [1]
