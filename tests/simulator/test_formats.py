"""FRACTAL_NZ on the simulated NPU: laid out as documented, taken by products, refused by whoever reads it as rows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from npu_patch import simulator
from npu_patch.simulator import memory

ND, NZ = 2, 29
pytestmark = pytest.mark.usefixtures("simulated")


@pytest.fixture(autouse=True)
def internal_formats() -> Iterator[None]:
    torch.npu.config.allow_internal_format = True
    yield
    torch.npu.config.allow_internal_format = False


def cast(values: Tensor) -> Tensor:
    return torch_npu.npu_format_cast(values.to("npu:0"), NZ)


@pytest.mark.parametrize(
    ("dtype", "shape", "stored"),
    [
        (torch.bfloat16, (48, 40), 48 * 48),
        (torch.float16, (3, 32, 48), 3 * 32 * 48),
        (torch.bfloat16, (5, 7), 16 * 16),
        (torch.int8, (48, 40), 48 * 64),
        (torch.float32, (16, 20), 16 * 32),
    ],
)
def test_a_cast_pads_to_whole_blocks_and_comes_back_bitwise(
    dtype: torch.dtype, shape: tuple[int, ...], stored: int
) -> None:
    values = torch.randint(-9, 9, shape).to(dtype)
    laid = cast(values)
    assert torch_npu.get_npu_format(laid) == NZ and laid.shape == values.shape and laid.stride() == values.stride()
    assert laid.untyped_storage().nbytes() == stored * dtype.itemsize
    back = torch_npu.npu_format_cast(laid, ND)
    assert torch_npu.get_npu_format(back) == ND and torch.equal(back.cpu(), values)
    assert torch.equal(laid.cpu(), values) and torch.equal(laid.mT.cpu(), values.mT)


def test_the_memory_is_that_of_blocks_of_sixteen_by_sixteen() -> None:
    values = torch.arange(32 * 48).view(32, 48).to(torch.int16)
    stored = memory.elements(cast(values)).view(3, 2, 16, 16)  # columns of blocks, their rows, a block
    for column in range(3):
        for row in range(2):
            block = values[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            assert torch.equal(stored[column, row], block)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(8, 32), (4, 8, 32)])
def test_products_take_it_with_the_gradient_of_the_other_factor(shape: tuple[int, ...], bias: bool) -> None:
    weight, x = torch.randn(48, 32).bfloat16(), torch.randn(shape).bfloat16()
    added = torch.randn(48).bfloat16().to("npu:0") if bias else None
    results = []
    for own in (weight.to("npu:0"), cast(weight)):
        given = x.to("npu:0").requires_grad_()
        y = F.linear(given, own, added)
        results.append((y, *torch.autograd.grad(y.float().square().sum(), given)))
    for plain, laid in zip(*results, strict=True):
        assert torch.equal(plain.cpu(), laid.cpu())


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_take_it(transposed: bool) -> None:
    values, x = torch.randn(3, 32, 48).bfloat16(), torch.randn(10, 48 if transposed else 32).bfloat16().to("npu:0")
    counts = torch.tensor([4, 0, 6], device="npu:0")
    plain, laid = [
        torch.ops.npu.npu_grouped_matmul(
            [x],
            [own.mT if transposed else own],
            split_item=2,
            group_type=0,
            group_list=counts,
            group_list_type=1,
        )[0]
        for own in (values.to("npu:0"), cast(values))
    ]
    assert torch.equal(plain.cpu(), laid.cpu())


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], object], str]] = {
    "elementwise": (lambda w, x: w + 1, "aten::add: a tensor"),
    "in place": (lambda w, x: w.add_(1), "aten::add_: a tensor"),
    "first factor": (lambda w, x: torch.mm(w, x.t()), "aten::mm: a tensor"),
    "rows": (lambda w, x: F.linear(x, w[:32]), "a view"),
    "an embedding": (
        lambda w, x: F.embedding(torch.zeros(2, dtype=torch.int64, device=x.device), w),
        "aten::embedding",
    ),
    "another shape": (lambda w, x: torch.mm(x, w.view(32, 48)), "a view"),
    "batched": (lambda w, x: torch.bmm(x[None], w.t()[None]), "aten::bmm: a tensor"),
    "another dtype": (lambda w, x: w.float(), "FRACTAL_NZ into another dtype|dtype_cast"),
    "a list": (lambda w, x: torch._foreach_add_([w], 1.0), "aten::_foreach_add_"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_reads_it_as_rows_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(simulator.Refused, match=message):
        call(cast(torch.randn(48, 32).bfloat16()), torch.randn(4, 32, device="npu:0").bfloat16())


def test_products_in_float32_are_refused() -> None:
    with pytest.raises(simulator.Refused, match="aten::mm: a factor in FRACTAL_NZ in float32"):
        torch.mm(torch.randn(2, 32, device="npu:0"), cast(torch.randn(32, 16)))


@pytest.mark.parametrize("allowed", [True, False])
def test_copies_keep_the_format_while_internal_formats_are_allowed(allowed: bool) -> None:
    values = torch.randn(48, 32).bfloat16()
    laid = cast(values)
    torch.npu.config.allow_internal_format = allowed
    for made in (laid.clone(), torch.nn.Parameter(copy.deepcopy(torch.nn.Parameter(laid)).data)):
        assert torch_npu.get_npu_format(made) == (NZ if allowed else ND)
        assert torch.equal(made.cpu(), values) and made.data_ptr() != laid.data_ptr()
    assert torch_npu.get_npu_format(torch.empty_like(laid)) == (NZ if allowed else ND)


def test_what_is_copied_into_it_is_laid_out() -> None:
    laid, values = cast(torch.randn(48, 32).bfloat16()), torch.randn(48, 32).bfloat16()
    for source in (values, values.to("npu:0"), cast(values)):
        laid.copy_(torch.zeros_like(values))
        laid.copy_(source)
        assert torch_npu.get_npu_format(laid) == NZ and torch.equal(laid.cpu(), values)


def test_a_cast_is_a_launch_and_no_graph_has_one() -> None:
    plain = torch.randn(48, 32, device="npu:0").bfloat16()
    with simulator.count() as counted:
        laid = torch_npu.npu_format_cast(plain, NZ)
        assert torch_npu.npu_format_cast(laid, NZ) is laid
    assert counted.by_op == {"npu::npu_format_cast": (1, 2 * 48 * 32 * 2)}
    with pytest.raises(RuntimeError), torch.npu.graph(torch.npu.NPUGraph()):
        torch_npu.npu_format_cast(laid, ND)


def test_a_graph_with_a_product_of_it_replays() -> None:
    weight = torch.randn(48, 32).bfloat16()
    x, laid, graph = torch.zeros(2, 32, device="npu:0").bfloat16(), cast(weight), torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        y = F.linear(x, laid)
    x.copy_(torch.randn(2, 32))
    graph.replay()
    assert torch.equal(y.cpu(), F.linear(x, weight.to("npu:0")).cpu())
