"""LoRA of peft's by the Triton kernels: loss and gradients on a patched model, checkpoints, what is left to others."""

from __future__ import annotations

import contextlib
import copy
import statistics

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as AdaptedLinear

import npu_patch
from tests.support.gradients import in_float64, relative_error
from tests.support.lora_models import HALF, PRECISIONS, a_step, adapted_model, fell_through
from tests.support.parity import why_unequal
from tests.support.tiny_models import tiny_batch
from tests.support.training_modes import MODES

pytest.importorskip("triton.backends.ascend")
ALONE = {"fused_ops": False, "moe_patch": False, "fla": False, "triton": True}


def ran_by(report: npu_patch.Report) -> dict[str, int]:
    return {name: count for each in report if each.patch == "lora" for name, count in each.calls.ran_by.items()}


def test_loss_and_every_gradient_in_float32(npu: torch.device) -> None:
    model = adapted_model("qwen3")
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    layers = sum(isinstance(each, AdaptedLinear) for each in model.modules())
    own = a_step(model)
    with npu_patch.applied(model, **ALONE) as report:
        found = a_step(model)
    assert not fell_through(report)
    assert ran_by(report) == {"triton": layers}
    assert why_unequal(on_cpu, tiny_batch(seed=3), own, found) is None


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_no_further_from_float64_than_the_original(name: str, npu: torch.device) -> None:
    """The geometric mean of the ratios of all gradients' errors, over two models."""
    precision = PRECISIONS[name]
    ratios = []
    for seed in range(2):
        model = adapted_model("qwen3", 0.0, precision, seed)
        exact = a_step(in_float64(model))
        model = model.to(npu)
        own = a_step(model, precision)
        with npu_patch.applied(model, **ALONE) as report:
            found = a_step(model, precision)
        assert ran_by(report).keys() == {"triton"} and found.keys() == own.keys()
        for key in exact:
            errors = [relative_error(each[key], exact[key]) for each in (found, own)]
            ratios += [errors[0] / errors[1]] if errors[1] > 0 and exact[key].any() else []
    assert statistics.geometric_mean(ratios) < 1.1


@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_a_checkpoint_drops_again_what_the_forward_dropped(mode: str, npu: torch.device) -> None:
    """Bit by bit: so the gradients are those without a checkpoint, and others than without dropout."""
    precision = PRECISIONS["bfloat16, float32 adapters"]
    model = adapted_model("qwen3", 0.3, precision).to(npu)
    with npu_patch.applied(model, **ALONE):
        steps = []
        for around in (contextlib.nullcontext(), MODES[mode](model)):
            with around:
                steps.append(a_step(model, precision))
        model.eval()
        undropped = a_step(model, precision)
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])
    assert not torch.equal(steps[0]["loss"], undropped["loss"])


@pytest.mark.parametrize("rank", [129, 512])
def test_a_rank_that_does_not_fit_is_served_by_the_operators(rank: int, npu: torch.device) -> None:
    base = torch.nn.Linear(48, 72)
    layer = AdaptedLinear(base, "default", LoraConfig(r=rank, init_lora_weights=False), r=rank, lora_alpha=3).to(npu)
    x = torch.randn(2, 5, 48, device=npu)
    expected = layer(x)
    with npu_patch.applied(layer, **ALONE) as report:
        torch.testing.assert_close(layer(x), expected)
    assert ran_by(report) == {"one function": 1}
