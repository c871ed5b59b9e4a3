"""Quantised operators against plain formulas with exact integers; and what their documentation does not allow."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn.functional import silu

from npu_patch.simulator import Refused

pytestmark = pytest.mark.usefixtures("simulated")

F16, BF16, F32, I8, I32 = torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32


def randn(*shape: int, dtype: torch.dtype = F32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(seed), dtype=I8)


def npu(value: Any) -> Any:
    if isinstance(value, list):
        return [npu(each) for each in value]
    return value.to("npu") if isinstance(value, Tensor) else value


def called(name: str, *arguments: Any, **named: Any) -> Any:
    """torch_npu's operator with the tensors on the NPU, its results on the CPU."""
    result = getattr(torch_npu, name)(*npu(list(arguments)), **{key: npu(value) for key, value in named.items()})
    return result.cpu() if isinstance(result, Tensor) else [each.cpu() for each in result]


def by_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.float().abs().amax(-1) / 127
    return (values.float() / scale.unsqueeze(-1)).round().to(I8), scale


# ---- rows ----


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_tokens_are_quantised_by_their_own_maximum(layout: str, dtype: torch.dtype) -> None:
    x = randn(3, 5, 16, dtype=dtype) if layout == "contiguous" else randn(3, 16, 5, dtype=dtype).mT
    quantised, scale = called("npu_dynamic_quant", x)
    expected, expected_scale = by_rows(x)
    assert torch.equal(quantised, expected) and torch.equal(scale, expected_scale)


def test_halves_are_rounded_to_even_and_a_row_of_zeros_stays_zeros() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]], dtype=BF16)
    quantised, scale = called("npu_dynamic_quant", x)
    assert quantised.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert scale.tolist() == [1.0, 0.0]


def test_smoothing_multiplies_first_by_groups_of_rows() -> None:
    x, smooth = randn(2, 3, 8, dtype=BF16), randn(3, 8, dtype=BF16, seed=1)
    ends = torch.tensor([2, 2, 6], dtype=I32)
    quantised, scale = called("npu_dynamic_quant", x, smooth_scales=smooth, group_index=ends)
    of_row = smooth[torch.tensor([0, 0, 2, 2, 2, 2])].view(2, 3, 8)
    expected, expected_scale = by_rows(x.float() * of_row.float())
    assert torch.equal(quantised, expected) and torch.equal(scale, expected_scale)


def test_four_bits_are_packed_by_eight_the_first_lowest() -> None:
    packed, scale = called("npu_dynamic_quant", torch.tensor([[7, -1, 0, 0, 0, 0, 0, -7]] * 2, dtype=F16), dst_type=16)
    assert packed.dtype == I32 and packed.shape == (2, 1)
    assert packed[0].item() & 0xFFFFFFFF == 0x900000F7
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("mask", [None, [True, False], [True, True]])
@pytest.mark.parametrize("smooth", [0, 1, 2])
def test_add_and_norm_are_quantised_once_or_twice(smooth: int, mask: list[bool] | None) -> None:
    if mask == [True, False] and smooth == 2:
        pytest.skip("refused, see below")
    x1, x2, gamma = randn(2, 3, 16, dtype=BF16), randn(2, 3, 16, dtype=BF16, seed=1), randn(16, dtype=BF16, seed=2)
    scales = {f"smooth_scale{i + 1}": randn(16, dtype=BF16, seed=3 + i) for i in range(smooth)}
    y1, y2, x, scale1, scale2 = called(
        "npu_add_rms_norm_dynamic_quant", x1, x2, gamma, **scales, beta=gamma, output_mask=mask
    )
    wide = x1.float() + x2.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * gamma.float() + gamma.float()
    assert torch.equal(x, (x1 + x2))
    for i, (y, scale) in enumerate(((y1, scale1), (y2, scale2))):
        if i == 1 and not (mask or [True, smooth == 2])[1]:
            assert y.numel() == scale.numel() == 1
            continue
        factor = scales.get(f"smooth_scale{i + 1}", torch.ones(16)).float()
        expected, expected_scale = by_rows(normed * factor)
        assert torch.equal(y, expected) and torch.equal(scale, expected_scale)


# ---- products ----

X, WEIGHT = integers(6, 70), integers(70, 9, seed=1)
SUMS = X.to(I32) @ WEIGHT.to(I32)
SCALE, PER_TOKEN = randn(9).abs() * 1e-3, randn(6, seed=1).abs()


@pytest.mark.parametrize("bias_dtype", [None, I32, F32, "result"])
@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("turned", [False, True])
def test_products_are_exact_and_scaled_by_row_and_column(turned: bool, dtype: torch.dtype, bias_dtype: Any) -> None:
    bias_dtype = dtype if bias_dtype == "result" else bias_dtype
    bias = None if bias_dtype is None else (randn(9, seed=2) * 1000).to(bias_dtype)
    weight = WEIGHT.t().contiguous().t() if turned else WEIGHT
    result = called(
        "npu_quant_matmul", X, weight, SCALE, pertoken_scale=PER_TOKEN, bias=bias, output_dtype=dtype
    )  # fmt: skip
    sums = SUMS + bias if bias_dtype == I32 else SUMS
    expected = sums.float() * SCALE * PER_TOKEN[:, None]
    if bias_dtype not in (None, I32):
        expected = expected + bias.float()
    assert torch.equal(result, expected.to(dtype))


def test_sums_beyond_what_float32_holds_are_exact() -> None:
    x, weight = torch.full((1, 2049), 127, dtype=I8), torch.full((2049, 1), 127, dtype=I8)
    weight[0] = 126
    (result,) = called("npu_quant_matmul", x, weight, torch.ones(1), output_dtype=I32)
    assert result.item() == 2049 * 127 * 127 - 127


def test_batches_are_broadcast() -> None:
    x, weight = integers(4, 1, 3, 20), integers(2, 20, 5, seed=1)
    result = called("npu_quant_matmul", x, weight, torch.ones(5), output_dtype=I32)
    assert torch.equal(result, x.to(I32) @ weight.to(I32))


@pytest.mark.parametrize("packed", [False, True], ids=["float32", "of npu_trans_quant_param"])
def test_int8_results_are_rounded_to_nine_bits_before_the_offset(packed: bool) -> None:
    scale, offset = torch.full((9,), 0.00123456789), torch.arange(9.0) * 40 - 160
    cut = (scale.view(I32) & -0x2000).view(F32)
    expected = ((SUMS.float() * cut).round().clamp(-256, 255) + offset).clamp(-128, 127).to(I8)
    if packed:
        result = called("npu_quant_matmul", X, WEIGHT, called("npu_trans_quant_param", scale, offset))
    else:
        result = called("npu_quant_matmul", X, WEIGHT, scale, offset=offset)
    assert torch.equal(result, expected) and len(expected.unique()) > 30


def test_a_float32_scale_counts_with_19_bits_unless_rows_have_theirs() -> None:
    scale = torch.full((9,), 1 / 3 * 1e-3)
    whole = called("npu_quant_matmul", X, WEIGHT, scale, pertoken_scale=torch.ones(6), output_dtype=F16)
    cut = called("npu_quant_matmul", X, WEIGHT, scale, output_dtype=F16)
    assert torch.equal(whole, (SUMS.float() * scale).half())
    assert torch.equal(cut, (SUMS.float() * (scale.view(I32) & -0x2000).view(F32)).half()) and not cut.equal(whole)


@pytest.mark.parametrize(("mode", "bits"), [(0, 0x3EAAA000), (1, 0x3EAAA000 + 0x2000 * (0xAAB > 0x1000))])
def test_scales_are_packed_with_their_offset(mode: int, bits: int) -> None:
    packed = called("npu_trans_quant_param", torch.tensor([1 / 3]), torch.tensor([-3.4, 700.0]), mode)
    assert [value & 0xFFFFFFFF for value in packed.tolist()] == [bits, bits]
    assert [value >> 37 & 0x1FF for value in packed.tolist()] == [0x1FD, 255]
    assert all(value >> 46 == 1 for value in packed.tolist())


# ---- experts ----

EXPERTS = integers(3, 70, 9, seed=4)
COUNTS = torch.tensor([2, 0, 3])
OF_ROW = torch.tensor([0, 0, 2, 2, 2])
GROUPED = (X[:5, None].to(I32) @ EXPERTS[OF_ROW].to(I32))[:, 0]
OF_EXPERT = randn(3, 9, seed=5).abs() * 1e-3


def grouped(
    x: Tensor = X, weight: Tensor = EXPERTS, counts: Tensor = COUNTS, split_item: int = 2, **some: Any
) -> list[Tensor]:
    options = {"group_list": counts, "split_item": split_item, "group_type": 0, "group_list_type": 1, **some}
    return called("npu_grouped_matmul", [x], [weight], **options)


@pytest.mark.parametrize("dtype", [F16, BF16])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bias", [None, (randn(3, 9) * 1000).to(I32)])
def test_rows_of_experts_are_exact_and_scaled(bias: Tensor | None, per_token: bool, dtype: torch.dtype) -> None:
    scale = OF_EXPERT if dtype == F16 else OF_EXPERT.bfloat16()
    some = {"per_token_scale": [PER_TOKEN]} if per_token else {}
    (y,) = grouped(scale=[scale], output_dtype=dtype, **some, **({} if bias is None else {"bias": [bias]}))
    sums = GROUPED if bias is None else GROUPED + bias[OF_ROW]
    expected = sums.float() * scale[OF_ROW].float() * (PER_TOKEN[:5, None] if per_token else 1.0)
    assert torch.equal(y[:5], expected.to(dtype))
    assert y[5:].isnan().all()  # no expert's


def test_sums_of_experts_go_through_swiglu_into_the_next_product() -> None:
    experts, of_expert = integers(3, 70, 256, seed=6), randn(3, 256, seed=7).abs() * 1e-3
    (sums,) = grouped(weight=experts, output_dtype=I32)
    expected = (X[:5, None].to(I32) @ experts[OF_ROW].to(I32))[:, 0]
    assert sums.dtype == I32 and torch.equal(sums[:5], expected)
    y, scale = called(
        "npu_dequant_swiglu_quant", sums, weight_scale=of_expert, activation_scale=PER_TOKEN, group_index=COUNTS,
        activate_left=True, quant_mode=1,
    )  # fmt: skip
    gate, up = (expected.float() * of_expert[OF_ROW] * PER_TOKEN[:5, None]).chunk(2, -1)
    quantised, of_row = by_rows(silu(gate) * up)
    assert torch.equal(y[:5], quantised) and torch.equal(scale[:5], of_row)
    assert scale[5:].isnan().all()


def test_int8_of_experts_by_a_packed_scale() -> None:
    packed = called("npu_trans_quant_param", OF_EXPERT[:1].reshape(-1)).expand(3, 9).contiguous()
    (y,) = grouped(scale=[packed])
    cut = (OF_EXPERT[0].view(I32) & -0x2000).view(F32)
    assert torch.equal(y[:5], (GROUPED.float() * cut).round().clamp(-128, 127).to(I8))


@pytest.mark.parametrize("form", ["joined", "apart"])
def test_lists_of_int8(form: str) -> None:
    x, weights = [X[:2].clone(), X[2:].clone()], [EXPERTS[0], EXPERTS[1]]
    options = {"split_item": 3, "group_type": 0} if form == "joined" else {"split_item": 0, "group_type": -1}
    results = called(
        "npu_grouped_matmul", x, weights, scale=list(OF_EXPERT[:2].bfloat16().unbind()),
        per_token_scale=[PER_TOKEN[:2].clone(), PER_TOKEN[2:].clone()], output_dtype=BF16, **options,
    )  # fmt: skip
    expected = [
        ((x[i].to(I32) @ weights[i].to(I32)).float() * OF_EXPERT[i].bfloat16().float() * rows[:, None]).bfloat16()
        for i, rows in enumerate((PER_TOKEN[:2], PER_TOKEN[2:]))
    ]
    assert torch.equal(torch.cat(results), torch.cat(expected))


# ---- swiglu ----


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("dtype", [F16, BF16])
def test_swiglu_of_halves_is_quantised(dtype: torch.dtype, left: bool) -> None:
    x, smooth = randn(4, 12, dtype=dtype), randn(1, 6, seed=1)
    y, scale = called("npu_dequant_swiglu_quant", x, quant_scale=smooth, activate_left=left, quant_mode=1)
    halves = x.float().chunk(2, -1)
    expected, expected_scale = by_rows(silu(halves[not left]) * halves[left] * smooth)
    assert torch.equal(y, expected) and torch.equal(scale, expected_scale)


def test_static_scales_divide_and_clamped_swiglu_takes_pairs() -> None:
    x, smooth, offset = randn(4, 12, dtype=BF16) * 5, randn(1, 6, seed=1).abs() / 9, randn(1, 6, seed=2)
    y, _ = called("npu_dequant_swiglu_quant", x, quant_scale=smooth, quant_offset=offset, swiglu_mode=1)
    gate, other = x[:, ::2].float().clamp(max=7), x[:, 1::2].float().clamp(-7, 7)
    expected = gate * torch.sigmoid(1.702 * gate) * (other + 1) / smooth + offset
    assert torch.equal(y, expected.round().clamp(-128, 127).to(I8))


# ---- refusals ----


def quant(x: Tensor | None = None, **some: Any) -> Any:
    return called("npu_dynamic_quant", randn(3, 8, dtype=BF16) if x is None else x, **some)


def matmul(x1: Tensor = X, x2: Tensor = WEIGHT, scale: Tensor = SCALE, **some: Any) -> Any:
    return called("npu_quant_matmul", x1, x2, scale, **some)


def add_norm(x1: Tensor | None = None, **some: Any) -> Any:
    x1 = randn(3, 8, dtype=BF16) if x1 is None else x1
    return called("npu_add_rms_norm_dynamic_quant", x1, x1, randn(8, dtype=BF16), **some)


def swiglu(x: Tensor | None = None, **some: Any) -> Any:
    return called("npu_dequant_swiglu_quant", randn(3, 8, dtype=BF16) if x is None else x, **some)


ROW = randn(8, dtype=BF16)
REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("float32 tokens", lambda: quant(randn(3, 8)), "dtype of input"),
    ("one dimension", lambda: quant(ROW), "2 dimensions"),
    ("another smooth dtype", lambda: quant(smooth_scales=randn(8)), "dtypes must be equal"),
    ("groups of one smooth row", lambda: quant(smooth_scales=ROW, group_index=torch.tensor([3], dtype=I32)), "[groups"),
    ("int64 ends", lambda: quant(smooth_scales=ROW[None], group_index=torch.tensor([3])), "int32 [1]"),
    (
        "ends before the last row",
        lambda: quant(smooth_scales=ROW[None], group_index=torch.tensor([2], dtype=I32)),
        "3 r",
    ),
    ("mode of another chip", lambda: quant(quant_mode="perchannel"), "perchannel"),
    ("int4 of 9", lambda: quant(randn(2, 9, dtype=BF16), dst_type=16), "multiple of 8"),
    ("halves", lambda: matmul(X.half()), "dtype of x1"),
    ("no tokens", lambda: matmul(X[:0]), "x1 must not be empty"),
    ("another K", lambda: matmul(X[:, :5]), "one K"),
    ("scales of rows", lambda: matmul(scale=torch.ones(6), output_dtype=BF16), "scale must be [1] or [9], not [6]"),
    ("2-D scale", lambda: matmul(scale=SCALE[:, None], output_dtype=BF16), "not [9, 1]"),
    ("2-D scale of rows", lambda: matmul(pertoken_scale=PER_TOKEN[:, None], output_dtype=BF16), "must be [6]"),
    ("rows of int8", lambda: matmul(pertoken_scale=PER_TOKEN), "pertoken_scale is for bfloat16 and float16"),
    ("half rows", lambda: matmul(pertoken_scale=PER_TOKEN.half(), output_dtype=BF16), "dtype of pertoken_scale"),
    ("float32 result", lambda: matmul(output_dtype=F32), "output_dtype must be one of"),
    ("bfloat16 scale, float16", lambda: matmul(scale=SCALE.bfloat16(), output_dtype=F16), "scale must be one of"),
    ("float bias, float16", lambda: matmul(bias=SCALE, output_dtype=F16), "bias must be one of int32"),
    ("offset of bfloat16", lambda: matmul(offset=SCALE, output_dtype=BF16), "offset is for a result of int8"),
    ("bias of 2 x 9", lambda: matmul(bias=torch.ones(2, 9, dtype=I32), output_dtype=I32), "bias must be [9] or [1, 9]"),
    ("batches", lambda: matmul(integers(2, 3, 4), integers(3, 4, 9), output_dtype=BF16), "cannot be broadcast"),
    ("wide", lambda: matmul(integers(1, 65536), integers(65536, 1), torch.ones(1)), "at most 65535"),
    ("half scale", lambda: called("npu_trans_quant_param", SCALE.half()), "dtype of scale"),
    ("scale 2 x 3", lambda: called("npu_trans_quant_param", torch.ones(2, 3)), "1-D or [1, N]"),
    ("experts without scale", lambda: grouped(output_dtype=BF16), "int8 inputs need scale"),
    ("float32 scale, bfloat16", lambda: grouped(scale=[OF_EXPERT], output_dtype=BF16), "scale must be bfloat16"),
    ("int32 with scale", lambda: grouped(scale=[OF_EXPERT], output_dtype=I32), "takes no scale"),
    ("experts' scale of 2", lambda: grouped(scale=[OF_EXPERT[:2]], output_dtype=F16), "[E, N]"),
    ("scale of another N", lambda: grouped(scale=[OF_EXPERT[:, :8]], output_dtype=F16), "scale must be [9]"),
    (
        "rows' scale of 5",
        lambda: grouped(scale=[OF_EXPERT], per_token_scale=[PER_TOKEN[:5]], output_dtype=F16),
        "rows of each x, [6], not [[5]]",
    ),
    ("scales of floats", lambda: grouped(X.half(), EXPERTS.half(), scale=[OF_EXPERT]), "scale is for int8 inputs"),
    ("1-D norm", lambda: add_norm(ROW), "2 to 8 dimensions"),
    ("float32 norm", lambda: add_norm(randn(3, 8)), "dtype of x1"),
    ("empty norm", lambda: add_norm(randn(0, 8, dtype=BF16)), "empty"),
    ("second without first", lambda: add_norm(smooth_scale2=ROW), "needs smooth_scale1"),
    ("nothing wanted", lambda: add_norm(output_mask=[False, False]), "want one of two"),
    ("smooth, not wanted", lambda: add_norm(smooth_scale2=ROW, output_mask=[True, False]), "needs output_mask[1]"),
    ("3-D swiglu", lambda: swiglu(randn(2, 3, 8, dtype=BF16)), "[T, 2H]"),
    ("int32 without scales", lambda: swiglu(torch.ones(3, 8, dtype=I32), quant_mode=1), "needs weight_scale"),
    ("scales of halves", lambda: swiglu(weight_scale=torch.ones(1, 8)), "must be None"),
    ("static groups", lambda: swiglu(randn(3, 128, dtype=BF16), group_index=torch.tensor([3])), "needs quant_mode 1"),
    ("groups of H 4", lambda: swiglu(group_index=torch.tensor([3]), quant_mode=1), "multiple of 64"),
    (
        "too many rows",
        lambda: swiglu(randn(3, 128, dtype=BF16), group_index=torch.tensor([4]), quant_mode=1),
        "at most the 3 rows",
    ),
]


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(Refused) as refusal:
        call()
    assert words in str(refusal.value)


def test_a_weight_in_blocks_is_taken_and_no_other_factor() -> None:
    weight, x = integers(64, 32, seed=1), integers(3, 64)
    torch.npu.config.allow_internal_format = True
    try:
        blocks = torch_npu.npu_format_cast(weight.npu(), 29)
    finally:
        torch.npu.config.allow_internal_format = False
    assert torch_npu.get_npu_format(blocks) == 29
    one = torch.ones(1, device="npu")
    result = torch_npu.npu_quant_matmul(x.npu(), blocks, one, output_dtype=I32)
    assert torch.equal(result.cpu(), x.to(I32) @ weight.to(I32))
    with pytest.raises(Refused, match="only the second factor"):
        torch_npu.npu_quant_matmul(blocks, x.npu().t(), one, output_dtype=I32)
