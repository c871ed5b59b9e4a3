"""Unpatched models on the simulated NPU compute what they compute on the CPU."""

import copy

import pytest
import torch

from tests.tiny_models import FAMILIES, tiny, tiny_batch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    largest = expected.abs().max().item()
    return (actual.cpu() - expected).abs().max().item() / max(largest, 1e-20)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_equal_the_cpu(family: str, npu: torch.device) -> None:
    on_cpu = tiny(family)
    on_npu = copy.deepcopy(on_cpu).to(npu)
    batch = tiny_batch()
    expected = on_cpu(**batch).loss
    expected.backward()
    actual = on_npu(**{key: value.to(npu) for key, value in batch.items()}).loss
    actual.backward()

    assert relative_error(actual.detach(), expected.detach()) < 1e-6
    gradients = {name: p.grad for name, p in on_npu.named_parameters()}
    for name, parameter in on_cpu.named_parameters():
        if parameter.grad is None:
            assert gradients[name] is None, name
            continue
        assert gradients[name].device == npu
        assert relative_error(gradients[name], parameter.grad) < 1e-6, name
