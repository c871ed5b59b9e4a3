"""How many kernels an RMSNorm takes on the NPU."""

from __future__ import annotations

import pytest
import torch

from npu_patch import simulator
from npu_patch.ops import rms_norm
from npu_patch.serving.implementation import choose

VARIANTS = {variant.name: variant for variant in (*rms_norm.PLAIN_VARIANTS, *rms_norm.GATED_VARIANTS)}


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("weight", 1, 2),  # the operator, and the gradient of the weight in its dtype
        ("1 + weight", 1, 4),  # and 1 + weight in float32
        ("weight, gated by silu", 3, 5),
    ],
)
@pytest.mark.parametrize("trained", [True, False])
def test_a_norm_in_half_precision_takes_few_kernels(
    name: str, forward: int, backward: int, trained: bool, npu: torch.device, simulated: None
) -> None:
    variant = VARIANTS[name]
    kernel = choose(rms_norm.RMS_NORM.implementations, "npu").chosen
    assert kernel is not None
    x, gate = (torch.randn(2, 3, 32).to(npu, torch.bfloat16).requires_grad_(trained) for _ in range(2))
    weight = torch.randn(32).to(npu, torch.bfloat16).requires_grad_(trained)
    with simulator.count() as counted:
        y = kernel.run(variant, x, weight, 1e-6, None if variant.gate is None else gate, False)
    assert counted.launches == forward, counted
    if trained:
        dy = torch.ones_like(y)
        with simulator.count() as counted:
            y.backward(dy)
        assert counted.launches <= backward, counted


def test_heads_of_projections_are_not_copied(npu: torch.device, simulated: None) -> None:
    kernel = choose(rms_norm.RMS_NORM.implementations, "npu").chosen
    assert kernel is not None
    heads = torch.randn(2, 7, 3, 32).to(npu, torch.bfloat16).transpose(1, 2)
    weight = torch.randn(32).to(npu, torch.bfloat16)
    with simulator.count() as counted:
        kernel.run(VARIANTS["1 + weight"], heads, weight, 1e-6, None, False)
    assert counted.launches == 1, counted


def test_only_the_gradients_asked_for_are_given(npu: torch.device) -> None:
    kernel = choose(rms_norm.RMS_NORM.implementations, "npu").chosen
    assert kernel is not None
    x = torch.randn(4, 32).to(npu, torch.bfloat16).requires_grad_()
    weight = torch.randn(32).to(npu, torch.bfloat16)  # frozen
    y = kernel.run(VARIANTS["1 + weight"], x, weight, 1e-6, None, False)
    dx, d_weight, _ = y.grad_fn.apply(torch.ones_like(y))
    assert dx is not None and d_weight is None
