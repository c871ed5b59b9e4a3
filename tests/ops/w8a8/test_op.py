"""The op of int8 linears: right on each device's implementation, and a check that finds wrong operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from npu_patch.measuring.measure import check
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.ops.w8a8.linear import TORCH_INT8, Int8Products, int8_linear, rows_of
from npu_patch.ops.w8a8.npu import NPU_INT8, WIDEST
from npu_patch.ops.w8a8.op import W8A8, case
from npu_patch.ops.w8a8.quantised import Quantised
from npu_patch.serving.case import Alternative
from tests.support.w8a8 import int8_layer

HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CASES = [
    (BRAIN, BRAIN, None),
    (BRAIN, BRAIN, BRAIN),
    (BRAIN, FULL, FULL),
    (HALF, HALF, HALF),
    (HALF, FULL, None),
    (FULL, FULL, FULL),
    (FULL, BRAIN, None),
]
BY_NPU, BY_TORCH = W8A8.implementations


@pytest.mark.parametrize("sizes", [(24, 40), (64, 1100), (160, 96)])
@pytest.mark.parametrize("kinds", CASES, ids=str)
def test_each_implementation_passes_its_check(kinds: Any, sizes: tuple[int, int], npu: torch.device) -> None:
    wanted = case(*sizes, *kinds)
    for each, device in ((BY_NPU, npu), (BY_TORCH, torch.device("cpu"))):
        found = check(wanted, Alternative(each.name, each.run, each.unsupported), device)
        assert found.wrong is None and wanted.why_not_by(each) is None


def test_the_titles_of_cases_tell_all_of_them_apart() -> None:
    cases = [case(24, 40, *kinds) for kinds in CASES]
    assert len({each.name for each in cases}) == len(cases) == len({each.key() for each in cases})


def product_with(change: Callable[..., tuple[Any, ...]]) -> Int8Products:
    def product(*given: Any) -> Tensor:
        return TORCH_INT8.product(*change(*given))

    return Int8Products(TORCH_INT8.quantise, product)


def quantised_with(change: Callable[[Quantised], Quantised]) -> Int8Products:
    return Int8Products(lambda x: change(TORCH_INT8.quantise(x)), TORCH_INT8.product)


WRONG: dict[str, Int8Products] = {
    "one scale for all rows": quantised_with(
        lambda rows: Quantised(rows.values, rows.scale.max().expand(len(rows[1])))
    ),
    "scales of 128": quantised_with(lambda rows: Quantised(rows.values, rows.scale * (127 / 128))),
    "values cut off": quantised_with(lambda rows: Quantised((rows.values // 2) * 2, rows.scale)),
    "values of 7 bits": quantised_with(lambda rows: Quantised(rows.values.clamp(-64, 63), rows.scale)),
    "rows in another order": quantised_with(lambda rows: Quantised(rows.values.flip(0), rows.scale)),
    "no bias": product_with(lambda rows, weight, scale, bias, dtype: (rows, weight, scale, None, dtype)),
    "weight read the other way": product_with(
        lambda rows, weight, scale, bias, dtype: (rows, weight.t().contiguous(), scale, bias, dtype)
    ),
    "one scale for all outputs": product_with(
        lambda rows, weight, scale, bias, dtype: (rows, weight, scale[:1].expand_as(scale), bias, dtype)
    ),
    "the bias times the scale": product_with(
        lambda rows, weight, scale, bias, dtype: (rows, weight, scale, bias * scale.view(-1), dtype)
    ),
}


@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_operator_is_found(mistake: str, dtype: torch.dtype) -> None:
    def run(*call: Any) -> Tensor:
        return int8_linear(WRONG[mistake], *call)

    found = check(case(96, 96, dtype, dtype, dtype), Alternative(mistake, run), torch.device("cpu"))
    assert found.wrong is not None and "of its size off" in found.wrong


class Kind(Tensor):
    pass


def call(**changed: Tensor) -> tuple[Any, ...]:
    given = {
        "x": torch.ones(2, 3, 8, dtype=BRAIN),
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "scale": torch.ones(4, 1, dtype=BRAIN),
        "bias": None,
        "dtype": BRAIN,
        "rows": rows_of,
    }
    return tuple({**given, **changed}.values())


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("x", torch.ones(2, 8, device="meta"), "input on meta, a weight on cpu"),
        ("scale", torch.ones(4, 1, device="meta"), "input on cpu, a weight on meta"),
        ("x", torch.ones(2, 8).as_subclass(Kind), "a tensor of type Kind"),
        ("x", torch.ones(0, 8), "an input of 0 elements, a weight [4, 8]"),
        ("x", torch.ones(2, 7), "an input of 2 dimensions, 7 wide, a weight [4, 8]"),
        ("x", torch.ones(2, 8).double(), "an input, scale or bias in float64"),
        ("bias", torch.ones(4, dtype=torch.int32), "an input, scale or bias in int32"),
        ("weight", torch.ones(4, 8), "a weight in float32 for a result in bfloat16"),
        ("dtype", torch.float64, "a weight in int8 for a result in float64"),
        ("scale", torch.ones(4, 2), "scales [4, 2] of a weight [4, 8]"),
        ("weight", torch.ones(WIDEST + 1, 8, dtype=torch.int8), f"a weight [{WIDEST + 1}, 8], wider than {WIDEST}"),
        ("weight", torch.ones(4, WIDEST + 1, dtype=torch.int8), f"a weight [4, {WIDEST + 1}], wider than {WIDEST}"),
    ],
    ids=lambda each: each[:40] if isinstance(each, str) else "",
)
def test_what_the_operator_does_not_take_is_left_with_the_reason(name: str, value: Any, reason: str) -> None:
    assert BY_NPU.unsupported(*call(**{name: value})) == reason


@pytest.mark.parametrize("implementation", W8A8.implementations, ids=lambda each: each.name)
def test_what_an_implementation_takes_is_not_left(implementation: Any) -> None:
    assert implementation.unsupported(*call()) is None


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("where", ["npu", "cpu"])
def test_the_plain_sums_are_exact_on_every_device(where: str, autocast: bool, npu: torch.device) -> None:
    """Wherever no product of float64 is, and where sums are beyond what float32 counts."""
    device = npu if where == "npu" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(100, 128, (8, 4099), generator=generator).to(torch.int8)
    values = torch.randint(100, 128, (24, 4099), generator=generator)
    values[:, 0] = 127
    expected = values.long() @ weight.long().t()
    assert expected.min() > 2**25
    layer = W8A8Linear(4099, 8, dtype=torch.float32)
    layer.weight.data, layer.weight_scale.data = weight, torch.ones(8, 1)
    with torch.autocast(device.type, HALF if where == "npu" else BRAIN, enabled=autocast):
        rows = TORCH_INT8.quantise(values.float().to(device))
        sums = TORCH_INT8.product(rows, layer.to(device).weight, layer.weight_scale, None, torch.float64)
    assert torch.equal(sums.cpu().float(), expected.float())


@pytest.mark.parametrize("products", [NPU_INT8, TORCH_INT8], ids=["npu", "torch"])
def test_the_result_may_be_changed_in_place(products: Int8Products, npu: torch.device) -> None:
    device = npu if products is NPU_INT8 else torch.device("cpu")
    layer = int8_layer(nn.Linear(8, 4, dtype=BRAIN)).to(device)
    x = torch.randn(2, 3, 8).to(device, BRAIN).requires_grad_()
    y = int8_linear(products, x, layer.weight, layer.weight_scale, layer.bias, BRAIN)
    expected = torch.autograd.grad((y * 2.0).sum(), x, retain_graph=True)[0]
    y.mul_(2.0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("products", [NPU_INT8, TORCH_INT8], ids=["npu", "torch"])
def test_the_gradient_has_the_dtype_of_the_input_where_autocast_computes(
    products: Int8Products, npu: torch.device
) -> None:
    device = npu if products is NPU_INT8 else torch.device("cpu")
    layer = int8_layer(nn.Linear(8, 4)).to(device)
    x = torch.randn(2, 3, 8).to(device).requires_grad_()
    y = int8_linear(products, x, layer.weight, layer.weight_scale, layer.bias, BRAIN)
    dx, dbias = torch.autograd.grad(y, (x, layer.bias), torch.ones_like(y))
    exact = (layer.weight.cpu().double() * layer.weight_scale.cpu().double()).sum(0)
    assert y.dtype == BRAIN and dx.dtype == dbias.dtype == FULL
    assert torch.allclose(dx.cpu().double(), exact.expand(2, 3, 8), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("needed", [False, True])
def test_nothing_is_kept_of_the_input_and_nothing_without_a_gradient(needed: bool, npu: torch.device) -> None:
    layer = int8_layer(nn.Linear(8, 4, dtype=BRAIN)).to(npu)
    x = torch.randn(2, 3, 8).to(npu, BRAIN).requires_grad_(needed)
    kept: list[Tensor] = []

    def keep(saved: Tensor) -> Tensor:
        kept.append(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved):
        y = int8_linear(NPU_INT8, x, layer.weight, layer.weight_scale, layer.bias, BRAIN)
    assert [each.data_ptr() for each in kept] == (
        [layer.weight.data_ptr(), layer.weight_scale.data_ptr()] if needed else []
    )
    assert y.requires_grad
