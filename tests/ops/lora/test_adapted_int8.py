"""Adapters beside int8 weights: what the layer and the adapter compute one after the other, in one function."""

import pytest
import torch
import torch.nn.functional as F

from npu_patch.ops.lora import adapted_linear
from npu_patch.ops.lora.adapted_linear import Adapter, adapted_linears, why_unsupported
from npu_patch.ops.lora.op import int8_case
from npu_patch.ops.lora.triton_kernels import why_unsupported_by_triton
from npu_patch.ops.w8a8.linear import TORCH_INT8, Int8Products, int8_linear

PRECISIONS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]


def layers(product: torch.dtype, compute: torch.dtype, dropout: float = 0.0) -> list:
    torch.manual_seed(0)
    found = []
    for width in (24, 40):
        down, up = torch.randn(4, 32, dtype=compute) / 6, torch.randn(width, 4, dtype=compute) / 2
        weight = torch.randint(-127, 128, (width, 32), dtype=torch.int8)
        scale = (torch.rand(width, 1) / 256 + 1e-3).to(product)
        adapter = Adapter(down.requires_grad_(), up.requires_grad_(), 0.75, dropout, product, compute, scale)
        found.append((weight, torch.randn(width, dtype=product), adapter))
    return found


def one_after_the_other(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, adapter: Adapter) -> torch.Tensor:
    assert adapter.weight_scale is not None
    y = int8_linear(TORCH_INT8, x, weight, adapter.weight_scale, bias, x.dtype)
    wide = F.linear(F.linear(x.to(adapter.compute), adapter.down), adapter.up)
    return (y + wide * adapter.scaling).to(adapter.product)


@pytest.mark.parametrize(("product", "compute"), PRECISIONS)
def test_it_is_the_layer_and_the_adapter_one_after_the_other(product: torch.dtype, compute: torch.dtype) -> None:
    given = layers(product, compute)
    x = torch.randn(2, 5, 32, dtype=product, requires_grad=True)
    wanted = [x, *(each for _, _, adapter in given for each in (adapter.down, adapter.up))]
    dys = [torch.randn(2, 5, 24, dtype=product), torch.randn(2, 5, 40, dtype=product)]
    results = []
    for computed in (adapted_linears(x, given), [one_after_the_other(x, *layer) for layer in given]):
        results.append([*computed, *torch.autograd.grad(computed, wanted, dys)])
    for ours, others in zip(*results, strict=True):
        assert (ours - others).abs().max() <= 6 * torch.finfo(product).eps * others.abs().max()


def test_layers_of_one_input_quantise_it_once_and_keep_no_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def quantise(x: torch.Tensor) -> object:
        asked.append(x)
        return TORCH_INT8.quantise(x)

    counted = Int8Products(quantise, TORCH_INT8.product)
    monkeypatch.setattr(adapted_linear, "int8_products", lambda device_type: counted)
    saved = []
    given = layers(torch.bfloat16, torch.bfloat16)
    x = torch.randn(2, 5, 32, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        adapted_linears(x, given)
    assert len(asked) == 1
    assert {each.data_ptr() for each in saved if each.dtype is torch.int8} == {each[0].data_ptr() for each in given}


def test_what_is_refused() -> None:
    weight, bias, adapter = layers(torch.float32, torch.float32)[0]
    x = torch.randn(3, 32)
    assert why_unsupported(x, weight, bias, adapter) is None
    assert why_unsupported_by_triton(x, weight, bias, adapter) == "an int8 weight"
    assert "torch.int8" in str(why_unsupported(x, weight, bias, adapter._replace(weight_scale=None)))


@pytest.mark.parametrize(("product", "compute"), PRECISIONS[1:])
def test_the_case_is_within_its_bar_of_float64_and_a_wrong_scale_is_not(
    product: torch.dtype, compute: torch.dtype
) -> None:
    case = int8_case(24, 32, 4, product, compute)
    torch.manual_seed(1)
    inputs = [torch.randn(shape, dtype=dtype) for shape, dtype in case.inputs(7)]
    exact = case.definition(*(each.double() for each in inputs))

    def far(scale: float) -> float:
        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, adapter: Adapter) -> torch.Tensor:
            assert adapter.weight_scale is not None
            own = adapter._replace(weight_scale=adapter.weight_scale * scale)
            return adapted_linears(x, [(weight, bias, own)])[0]

        return float((case.call(run, *inputs).double() - exact).abs().max() / exact.abs().max())

    assert far(1.0) < case.allowed[product] < far(1.1)
