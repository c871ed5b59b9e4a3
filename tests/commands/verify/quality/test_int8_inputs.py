"""Dequantised weights with rounded inputs compute what int8 layers do."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Linear
from torch.nn.functional import linear

from npu_patch.commands.verify.quality.int8_inputs import Int8Inputs
from npu_patch.ops.w8a8.layer import W8A8Linear


def made(bias: bool) -> tuple[W8A8Linear, Linear]:
    torch.manual_seed(0)
    int8, dense = W8A8Linear(40, 24, bias=bias), Linear(40, 24, bias=bias)
    int8.weight.data = torch.randint(-127, 128, (24, 40), dtype=torch.int8)
    int8.weight_scale.data = torch.rand(24, 1) / 100
    dense.weight.data = int8.weight.float() * int8.weight_scale
    if bias:
        int8.bias.data = dense.bias.data
    return int8, dense


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_what_its_int8_layer_computes(bias: bool) -> None:
    int8, dense = made(bias)
    x = torch.randn(2, 5, 40)
    with Int8Inputs([dense.weight]):
        found = dense(x)
    torch.testing.assert_close(found, int8(x), rtol=1e-5, atol=1e-5)
    assert (found - dense(x)).abs().max() > 1e-3


def test_slices_of_packed_weights_are_known_and_other_weights_are_left_alone() -> None:
    packed, other, x = torch.randn(3, 8, 40), torch.randn(8, 40), torch.randn(5, 40)
    inputs = Int8Inputs([packed])
    assert not inputs.has_met([packed])
    with inputs:
        of_slice, of_other = linear(x, packed[1]), linear(x, other)
    assert not torch.equal(of_slice, linear(x, packed[1])) and torch.equal(of_other, linear(x, other))
    assert inputs.has_met([packed]) and not inputs.has_met([other])
