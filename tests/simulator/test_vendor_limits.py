"""Calls at the edge of what the vendor's operators take: its own tests make them, or its sources refuse them."""

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch.simulator import Refused
from npu_patch.simulator.fused.rotary import backward_layout

pytestmark = pytest.mark.usefixtures("simulated")


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)


# ---- rotary ----

ROTARY = {
    "SBND, cos [S,1,1,D]": ((1100, 2, 5, 8), (1100, 1, 1, 8)),
    "BSND, cos [1,S,1,D]": ((2, 1100, 4, 8), (1, 1100, 1, 8)),
    "SBND, cos [S,B,1,D]": ((300, 3, 4, 8), (300, 3, 1, 8)),
    "BSND, cos [B,S,1,D]": ((3, 300, 4, 8), (3, 300, 1, 8)),
    "BSND, cos [B,S,1,D], B >= S": ((3, 2, 4, 8), (3, 2, 1, 8)),
    "BNSD, S = 1": ((1, 4, 1, 8), (1, 1, 1, 8)),
    "BNSD, cos [B,1,S,D]": ((2, 500, 9, 8), (2, 1, 9, 8)),
    "BNSD, cos [B,N,S,D]": ((2, 3, 9, 8), (2, 3, 9, 8)),
    "TND": ((1100, 4, 8), (1100, 1, 8)),
}


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@pytest.mark.parametrize("case", ROTARY)
def test_rotary_gradients_of_long_sequences(case: str) -> None:
    x_shape, table_shape = ROTARY[case]
    inputs = [randn(*x_shape), randn(*table_shape, seed=1), randn(*table_shape, seed=2)]
    exact = [value.double().requires_grad_() for value in inputs]
    given = [value.to("npu").requires_grad_() for value in inputs]
    grad = randn(*x_shape, seed=3)
    rotated(*exact).backward(grad.double())
    torch_npu.npu_rotary_mul(*given).backward(grad.to("npu"))
    for ours, expected in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), expected.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", [(80, 1, 9, 32), (1, 80, 9, 32), (80, 3, 1, 32)])
def test_a_short_sequence_is_refused_only_where_batch_and_heads_are_both_broadcast(shape: tuple[int, ...]) -> None:
    x, table = torch.ones(shape, device="npu"), torch.ones(1, 1, *shape[2:], device="npu")
    assert torch_npu.npu_rotary_mul(x, table, table).shape == shape
    many = torch.ones(80, 3, max(shape[2], 2), 32, device="npu")
    table = torch.ones(1, 1, *many.shape[2:], device="npu")
    with pytest.raises(Refused, match=r"B\*N <= 8\*S"):
        torch_npu.npu_rotary_mul(many, table, table)


@pytest.mark.parametrize(
    ("x", "cos", "expected"),
    [
        ((2, 9, 5, 8), (1, 9, 1, 8), (0, 2)),
        ((9, 2, 5, 8), (9, 1, 1, 8), (1, 2)),
        ((9, 2, 5, 8), (9, 2, 1, 8), (1, 2)),
        ((2, 5, 9, 8), (1, 1, 9, 8), (0, 1)),
        ((3, 2, 3, 8), (3, 1, 3, 8), None),  # cos [B,1,S,D] with B = S
    ],
)
def test_which_dimensions_backward_takes_for_batch_and_heads(
    x: tuple[int, ...], cos: tuple[int, ...], expected: tuple[int, int] | None
) -> None:
    assert backward_layout(torch.empty(x), torch.empty(cos)) == expected


@pytest.mark.parametrize("case", [((100, 40, 30, 8), (100, 1, 1, 8)), ((40, 100, 30, 8), (1, 100, 1, 8))])
def test_rotary_gradients_of_the_tables_are_limited_by_batch_and_heads(case: tuple[Any, Any]) -> None:
    x, table = torch.ones(case[0], device="npu"), torch.ones(case[1], device="npu", requires_grad=True)
    with pytest.raises(Refused, match=r"B\*N <= 1024, not 40\*30"):
        torch_npu.npu_rotary_mul(x, table, table).sum().backward()


# ---- attention ----


@pytest.mark.parametrize("operator", ["npu_fusion_attention", "npu_fusion_attention_v2", "npu_fusion_attention_v3"])
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD", "BSND", "TND"])
def test_layouts_may_be_in_lower_case(layout: str, operator: str) -> None:
    query = randn(
        *{"BSH": (2, 5, 16), "SBH": (5, 2, 16), "BNSD": (2, 2, 5, 8), "BSND": (2, 5, 2, 8)}.get(layout, (10, 2, 8))
    )
    options = {}
    if layout == "TND":
        lengths = [4, 10]
        options = dict.fromkeys(("actual_seq_qlen", "actual_seq_kvlen"), lengths)
        if operator.endswith("v3"):
            options = {key: torch.tensor(lengths) for key in options}
    call = getattr(torch_npu, operator)
    query = query.to("npu")
    upper, lower = (call(query, query, query, 2, name, **options)[0] for name in (layout, layout.lower()))
    assert torch.equal(upper, lower)


@pytest.mark.parametrize("operator", ["npu_fusion_attention", "npu_fusion_attention_v2", "npu_fusion_attention_v3"])
@pytest.mark.parametrize("layout", ["BSND", "tnd"])
def test_softmax_layout_is_for_tnd_only(layout: str, operator: str) -> None:
    query = randn(*((2, 5, 2, 8) if layout == "BSND" else (10, 2, 8))).to("npu")
    with pytest.raises(Refused, match="softmax_layout=TND only supported when input_layout=TND"):
        getattr(torch_npu, operator)(query, query, query, 2, layout, softmax_layout="TND")


def test_numels_counts_the_probabilities_of_packed_sequences() -> None:
    query = randn(10, 2, 8).to("npu")
    numels = torch_npu.npu_fusion_attention(
        query, query, query, 2, "TND", actual_seq_qlen=[4, 10], actual_seq_kvlen=[4, 10]
    )[-1]
    assert numels == 2 * (4 * 4 + 6 * 6)


KEEP, SEED, OFFSET = 0.7, 42, 8


def made_mask(*size: int, seed: int = SEED) -> Tensor:
    somewhere = torch.empty(1, device="npu")
    return torch_npu._npu_dropout_gen_mask(somewhere, list(size), 1 - KEEP, seed, OFFSET, parallel=True, sync=False)


def bits(mask: Tensor, *shape: int) -> Tensor:
    each = (mask.cpu()[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return each.flatten()[: torch.Size(shape).numel()].view(shape).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("operator", ["npu_fusion_attention", "npu_fusion_attention_v2"])
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_a_dropout_mask_of_the_caller(layout: str, operator: str, dtype: torch.dtype) -> None:
    lengths = [5, 5] if layout == "BNSD" else [4, 6]
    total = 2 * sum(length * length for length in lengths)
    inputs = [randn(2, 10, 8, seed=i, dtype=dtype) for i in range(4)]  # [N, T, D]: q, k, v, grad
    kept = [part.view(2, n, n) for part, n in zip(
        bits(made_mask(total), total).split([2 * n * n for n in lengths]), lengths, strict=True
    )]  # fmt: skip

    exact = [value.double().requires_grad_() for value in inputs[:3]]
    sequences = zip(*(value.split(lengths, 1) for value in exact), kept, strict=True)
    outs = [((q @ k.mT * 0.3).softmax(-1) * mask / KEEP) @ v for q, k, v, mask in sequences]
    torch.cat(outs, 1).backward(inputs[3].double())

    def laid_out(value: Tensor) -> Tensor:
        return torch.stack(value.split(5, 1)) if layout == "BNSD" else value.transpose(0, 1).contiguous()

    given = [laid_out(value).to("npu").requires_grad_() for value in inputs[:3]]
    options: dict[str, Any] = {"scale": 0.3, "keep_prob": KEEP, "seed": SEED, "offset": OFFSET}
    if layout == "TND":
        options |= {"actual_seq_qlen": [4, 10], "actual_seq_kvlen": [4, 10]}
    results = getattr(torch_npu, operator)(*given, 2, layout, dropout_mask=made_mask(total), **options)
    assert results[4:] == (SEED, OFFSET, total)
    results[0].backward(laid_out(inputs[3]).to("npu"))
    tolerance = 2e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(
        results[0].detach().cpu().double(), laid_out(torch.cat(outs, 1)).detach(), rtol=tolerance, atol=tolerance
    )
    for ours, expected in zip(given, exact, strict=True):
        torch.testing.assert_close(ours.grad.cpu().double(), laid_out(expected.grad), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("what", ["another seed", "too short", "no mask", "float"])
def test_a_dropout_mask_that_backward_could_not_make_again_is_refused(what: str) -> None:
    query = randn(1, 2, 8, 8).to("npu")
    masks = {
        "another seed": (lambda: made_mask(128, seed=7), "the seed and offset given beside it, 42 and 8"),
        "too short": (lambda: made_mask(128)[:-1], r"\[16\] bytes, not \[15\]"),
        "no mask": (lambda: None, "need a dropout_mask"),
        "float": (lambda: made_mask(128).float(), "dtype of dropout_mask"),
    }
    mask, words = masks[what]
    with pytest.raises(Refused, match=words):
        torch_npu.npu_fusion_attention(
            query, query, query, 2, "BNSD", keep_prob=KEEP, dropout_mask=mask(), seed=SEED, offset=OFFSET
        )


# ---- dropout apart from attention ----


def test_a_mask_of_bits_keeps_a_share_and_ends_in_zeros() -> None:
    everything = torch_npu._npu_dropout_gen_mask(torch.empty(1, device="npu"), [3, 67], 0.0, 1, 0)
    assert everything.tolist() == [255] * 25 + [1] + [0] * 6  # 201 bits in 256
    assert torch_npu._npu_dropout_gen_mask(torch.empty(1, device="npu"), [128], 1.0, 1, 0).tolist() == [0] * 16
    share = bits(made_mask(100_000), 100_000).mean().item()
    assert abs(share - KEEP) < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_with_a_mask_of_bits(dtype: torch.dtype) -> None:
    x = randn(20, 10, dtype=dtype)
    given = x.to("npu").requires_grad_()
    y, mask = torch_npu.npu_dropout_do_mask(given, made_mask(20, 10), 1 - KEEP)
    kept = bits(mask, 20, 10)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(y.detach().cpu(), (x.double() * kept / KEEP).to(dtype))
    torch.testing.assert_close(given.grad.cpu(), (kept / KEEP).to(dtype))


def test_dropout_with_a_mask_of_bytes() -> None:
    given = randn(400, 10).to("npu").requires_grad_()
    torch.manual_seed(5)
    y, mask = torch_npu._dropout_with_byte_mask(given, 0.3)
    torch.manual_seed(5)
    assert torch.equal(torch_npu._dropout_with_byte_mask(given, 0.3)[0], y)
    assert mask.dtype == torch.uint8 and mask.shape == given.shape and abs(mask.float().mean().item() - 0.7) < 0.05
    y.sum().backward()
    torch.testing.assert_close(y, given * mask / 0.7)
    torch.testing.assert_close(given.grad, mask / 0.7)
