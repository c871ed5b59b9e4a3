"""A layer whose backward cannot be run is none that is known, and no failure: DeepSpeed binds another `F.linear`, whose
backward does not work under a CPU's autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.tuners.lora import layer as peft_layers

from npu_patch.ops.readings import NotRead
from npu_patch.probe.adapted_linear import read_adapted_linear


class _FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("expected m1 and m2 to have the same dtype")


class Layer(peft_layers.Linear):
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return _FailsBackward.apply(peft_layers.Linear.forward(self, x, *args, **kwargs))


@pytest.mark.filterwarnings("ignore")
def test_a_backward_that_fails_is_a_reason_not_to_serve_the_layer() -> None:
    reading = read_adapted_linear(Layer, Layer.forward)
    assert isinstance(reading, NotRead) and "m1 and m2" in reading.reason
