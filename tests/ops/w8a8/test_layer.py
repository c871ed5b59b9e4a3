"""The plain layer of int8 weights: what it computes, and what its gradient is."""

import pytest
import torch

from npu_patch.ops.w8a8 import linear
from npu_patch.ops.w8a8.layer import W8A8Linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def layer_of(weight: torch.Tensor, dtype: torch.dtype, bias: bool = True) -> W8A8Linear:
    layer = W8A8Linear(weight.shape[1], weight.shape[0], bias, dtype=dtype)
    scale = (weight.abs().amax(1, keepdim=True) / 127).to(dtype)
    with torch.no_grad():
        layer.weight.copy_((weight / scale.float()).round().clamp(-127, 127))
        layer.weight_scale.copy_(scale)
        if bias:
            layer.bias.copy_(torch.linspace(-1, 1, len(weight)))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_is_the_exact_int32_product_with_two_scales(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(24, 40), dtype)
    x = torch.randn(2, 3, 40, dtype=dtype)
    x[0, 1] = 0
    rows = x.float().view(-1, 40)
    scale = rows.abs().amax(-1) / 127
    values = torch.nan_to_num(rows / scale[:, None]).round()
    sums = (values.double() @ layer.weight.double().t()).float()
    expected = sums * layer.weight_scale.view(-1).float() * scale[:, None] + layer.bias.float()
    assert torch.equal(layer(x), expected.to(dtype).view(2, 3, 24))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_goes_through_the_dequantised_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(24, 40), dtype)
    x = torch.randn(2, 3, 40, dtype=dtype, requires_grad=True)
    dy = torch.randn(2, 3, 24, dtype=dtype)
    whole, dbias = torch.autograd.grad(layer(x), (x, layer.bias), dy)
    monkeypatch.setattr(linear, "SLICE", 24 * 7 * dtype.itemsize)
    (sliced,) = torch.autograd.grad(layer(x), x, dy)
    exact = dy.double() @ (layer.weight.double() * layer.weight_scale.double())
    for found in (whole, sliced):
        assert ((found - exact).abs().max() / exact.abs().max()) < 8 * torch.finfo(dtype).eps
    assert torch.allclose(dbias.double(), dy.double().sum((0, 1)), rtol=0.02, atol=0.02)
    assert layer.weight.grad is None and not layer.weight.requires_grad


def test_transforms_of_torch_func_compute_it_too() -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(24, 40), torch.float32)
    x = torch.randn(3, 40)
    dx = torch.ones(3, 24) @ (layer.weight * layer.weight_scale)
    assert torch.allclose(torch.func.vmap(layer)(x), layer(x), atol=1e-5)
    assert torch.allclose(torch.func.grad(lambda given: layer(given).sum())(x), dx, atol=1e-5)
