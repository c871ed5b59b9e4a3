"""Unpatched models on the simulated NPU compute what they compute on the CPU."""

import copy
from typing import Any

import pytest
import torch

from tests.tiny_models import FAMILIES, tiny, tiny_batch

pytestmark = pytest.mark.usefixtures("simulated")


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    largest = expected.abs().max().item()
    return (actual.cpu().double() - expected.double()).abs().max().item() / max(largest, 1e-20)


def loss_and_gradients(model: torch.nn.Module, batch: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    device = next(model.parameters()).device
    loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def in_float64(model: torch.nn.Module) -> torch.nn.Module:
    copied = copy.deepcopy(model).double()
    if hasattr(copied.config, "num_experts_per_tok"):
        copied.set_experts_implementation("eager")  # torch's grouped product has no float64
    return copied


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_cpu(family: str, npu: torch.device) -> None:
    """To 1e-6 relative, or five times the error of the CPU's float32 against float64 where that is larger: some
    gradients (dt_bias of the gated delta rule) are small differences of large numbers."""
    on_cpu = tiny(family)
    batch = tiny_batch()
    actual = loss_and_gradients(copy.deepcopy(on_cpu).to(npu), batch)
    exact = loss_and_gradients(in_float64(on_cpu), batch)
    expected = loss_and_gradients(on_cpu, batch)

    assert relative_error(actual["loss"], expected["loss"]) < 1e-6
    for name, gradient in expected.items():
        if gradient is None:
            assert actual[name] is None, name
            continue
        assert actual[name].device == npu
        rounding = relative_error(gradient, exact[name])
        assert relative_error(actual[name], gradient) < max(1e-6, 5 * rounding), name


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5", "qwen3_moe", "gemma3"])
def test_generate_gives_the_same_tokens(family: str, npu: torch.device) -> None:
    on_cpu = tiny(family)
    ids = tiny_batch(length=7)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # left padding
    arguments = {"max_new_tokens": 12, "do_sample": False}
    expected = on_cpu.generate(ids, attention_mask=mask, **arguments)
    on_npu = copy.deepcopy(on_cpu).to(npu)
    actual = on_npu.generate(ids.to(npu), attention_mask=mask.to(npu), **arguments)
    assert actual.device == npu
    assert torch.equal(actual.cpu(), expected)
