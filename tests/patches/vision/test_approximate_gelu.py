"""GELU's approximations by one operator: which activations are read, what they compute, and what is left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import activations

import npu_patch
from npu_patch import simulator
from npu_patch.numerics.values import values
from npu_patch.ops.approximate_gelu import SIGMOID, TANH, Approximation
from npu_patch.ops.readings import NotRead
from npu_patch.patches.vision.approximate_gelu import find, read_site
from npu_patch.probe.approximate_gelu import read_gelu

SERVED = {"QuickGELUActivation": SIGMOID, "NewGELUActivation": TANH, "FastGELUActivation": TANH}


def test_transformers_own_are_read() -> None:
    found = {site.owner.__name__: read_site(site) for site in find(activations)}
    assert {name: each for name, each in found.items() if isinstance(each, Approximation)} == SERVED


class AnotherSlope(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.6 * x)


class AnotherGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x).detach()


class Clipped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * torch.sigmoid(1.702 * x)).clamp(max=2.0)


@pytest.mark.parametrize("cls", [AnotherSlope, AnotherGradient, Clipped])
def test_what_is_none_is_not_read(cls: type[nn.Module]) -> None:
    assert isinstance(read_gelu(cls, cls.forward), NotRead)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_operator_each_way(name: str, dtype: torch.dtype, npu: torch.device) -> None:
    activation = getattr(activations, name)()
    x, on_cpu = (values((5, 7, 8), 3, dtype).to(each).detach() for each in (npu, "cpu"))
    x, on_cpu = x.requires_grad_(), on_cpu.double().requires_grad_()
    SERVED[name].reference(on_cpu).square().sum().backward()
    npu_patch.apply()
    with simulator.count() as counted:
        found = activation(x)
    assert counted.launches == 1
    found.square().sum().backward()
    bar = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}[dtype]
    assert torch.allclose(found.cpu().double(), SERVED[name].reference(on_cpu), rtol=bar, atol=bar)
    assert torch.allclose(x.grad.cpu().double(), on_cpu.grad, rtol=4 * bar, atol=4 * bar)
    npu_patch.restore()
    with simulator.count() as counted:
        activation(x)
    assert counted.launches > 1


@pytest.mark.parametrize(
    ("x", "reason"),
    [(torch.ones(3), "input on cpu"), (torch.ones(3, dtype=torch.float64), "input on cpu"), ("none", "no tensors")],
)
def test_what_is_not_served_is_the_original(x: Any, reason: str, npu: torch.device) -> None:
    npu_patch.apply()
    activation = activations.QuickGELUActivation()
    if isinstance(x, Tensor):
        assert torch.equal(activation(x), SIGMOID.reference(x))
    else:
        with pytest.raises(TypeError):
            activation(x)
    (outcome,) = [each for each in npu_patch.report().outcomes if "QuickGELU" in each.site]
    assert [each for each in outcome.calls.fell_through if reason in each]


def test_its_switch_turns_it_off() -> None:
    npu_patch.apply(approximate_gelu=False)
    assert not [each for each in npu_patch.report().outcomes if each.patch == "approximate_gelu"]
