"""Training attention against a float64 formula written here: layouts, masks, sparse modes, dropout, sinks."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from tests.simulator.fused.test_fused import DTYPES, check_operator, expect_close, randn
from tests.support.torch_npu_operators import has_operator

pytestmark = pytest.mark.usefixtures("simulated")

HEADS, KEY_HEADS, WIDTH = 4, 2, 12
SCALE = 0.3
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def exact(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor | None = None,
    pse: Tensor | None = None,
    sink: Tensor | None = None,
    pse_last: bool = False,
) -> Tensor:
    """[B, N, S, D] in float64."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT
    if pse is not None and not pse_last:
        scores = scores + pse
    scores = scores * SCALE
    if pse is not None and pse_last:
        scores = scores + pse
    if hidden is not None:
        scores = scores.masked_fill(hidden, -1e30)
    if sink is None:
        return scores.softmax(-1) @ value
    column = sink[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value


def inputs(queries: int = 5, keys: int = 7, batch: int = 2) -> dict[str, Tensor]:
    return {
        "query": randn(batch, HEADS, queries, WIDTH),
        "key": randn(batch, KEY_HEADS, keys, WIDTH, seed=1),
        "value": randn(batch, KEY_HEADS, keys, WIDTH, seed=2),
    }


def fused(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Tensor:
    return torch_npu.npu_fusion_attention(query, key, value, HEADS, "BNSD", scale=SCALE, **arguments)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BSH", "SBH", "BNSD", "BSND"])
def test_layouts(layout: str, dtype: torch.dtype, npu: torch.device) -> None:
    def to(x: Tensor) -> Tensor:
        return {
            "BSH": x.transpose(1, 2).flatten(2),
            "SBH": x.permute(2, 0, 1, 3).flatten(2),
            "BNSD": x,
            "BSND": x.transpose(1, 2),
        }[layout]

    def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        results = torch_npu.npu_fusion_attention(to(query), to(key), to(value), HEADS, layout, scale=SCALE)
        assert results[1].shape == results[2].shape == (2, HEADS, 5, 8)
        assert results[1].dtype == results[2].dtype == torch.float32
        assert results[3].numel() == 0
        assert results[4:] == (0, 0, 2 * HEADS * 5 * 7)  # numels, with or without dropout
        return results[0]

    check_operator(operator, lambda **some: to(exact(**some)), inputs(), dtype, npu)


def band(queries: int, keys: int, shift: int, before: int, after: int) -> Tensor:
    i, j = torch.arange(queries)[:, None], torch.arange(keys)[None]
    return (j > i + shift + after) | (j < i + shift - before)


@pytest.mark.parametrize(
    ("mode", "arguments", "hidden"),
    [
        (2, {}, band(5, 7, 0, 99, 0)),
        (3, {}, band(5, 7, 2, 99, 0)),
        (4, {"pre_tockens": 2, "next_tockens": 0}, band(5, 7, 2, 2, 0)),
        (4, {"pre_tockens": 1, "next_tockens": 1}, band(5, 7, 2, 1, 1)),
    ],
)
def test_compressed_sparse_modes(mode: int, arguments: dict[str, int], hidden: Tensor, npu: torch.device) -> None:
    mask = TRIANGLE.to(npu)
    check_operator(
        lambda **some: fused(**some, atten_mask=mask, sparse_mode=mode, **arguments),
        lambda **some: exact(**some, hidden=hidden),
        inputs(),
        torch.float32,
        npu,
    )


@pytest.mark.parametrize("mode", [2, 3, 4])
def test_without_a_mask_the_sparse_mode_is_ignored(mode: int, npu: torch.device) -> None:
    check_operator(lambda **some: fused(**some, sparse_mode=mode, next_tockens=0), exact, inputs(), torch.float32, npu)


@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 1, 5, 7), (1, 1, 5, 7), (5, 7)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_masks_hide_where_they_are_one(shape: tuple[int, ...], dtype: torch.dtype, npu: torch.device) -> None:
    hidden = randn(*shape) > 0.3
    hidden[..., 0] = False
    mask = hidden.to(dtype).to(npu)
    check_operator(
        lambda **some: fused(**some, atten_mask=mask),
        lambda **some: exact(**some, hidden=hidden),
        inputs(),
        torch.float32,
        npu,
    )


def test_fully_hidden_rows(npu: torch.device) -> None:
    some = {name: value.float().to(npu).requires_grad_() for name, value in inputs().items()}
    mask = torch.zeros(5, 7, dtype=torch.bool, device=npu)
    mask[2] = True
    mean = fused(**some, atten_mask=mask)[:, :, 2]
    expected = some["value"].mean(2).repeat_interleave(2, 1)
    torch.testing.assert_close(mean, expected)
    zero = fused(**some, atten_mask=mask, inner_precise=2)
    assert (zero[:, :, 2] == 0).all()
    zero[:, :, 2].sum().backward()
    assert all((value.grad == 0).all() for value in some.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_pse_is_added_before_scaling(dtype: torch.dtype, npu: torch.device) -> None:
    some = {**inputs(), "pse": randn(2, HEADS, 5, 7)}
    check_operator(fused, exact, some, dtype, npu)


def test_sink(npu: torch.device) -> None:
    check_operator(fused, exact, {**inputs(), "sink": randn(HEADS)}, torch.bfloat16, npu, keep=("sink",))


@pytest.mark.parametrize("softmax_layout", ["", "TND"])
@pytest.mark.parametrize("mode", [0, 3])
def test_packed_sequences(mode: int, softmax_layout: str, npu: torch.device) -> None:
    queries, keys = [2, 5, 9], [3, 7, 13]  # cumulative ends
    mask = TRIANGLE.to(npu) if mode == 3 else None

    def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        results = torch_npu.npu_fusion_attention(
            query, key, value, HEADS, "TND", scale=SCALE, atten_mask=mask, sparse_mode=mode,
            actual_seq_qlen=queries, actual_seq_kvlen=keys, softmax_layout=softmax_layout,
        )  # fmt: skip
        assert results[1].shape == (9, HEADS, 8)
        return results[0]

    def formula(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = []
        for q0, q1, k0, k1 in zip([0, *queries], queries, [0, *keys], keys, strict=False):
            hidden = band(q1 - q0, k1 - k0, (k1 - k0) - (q1 - q0), 99, 0) if mode == 3 else None
            q, k, v = (x.transpose(0, 1)[None] for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
            parts.append(exact(q, k, v, hidden)[0].transpose(0, 1))
        return torch.cat(parts)

    some = {"query": randn(9, HEADS, WIDTH), "key": randn(13, KEY_HEADS, WIDTH), "value": randn(13, KEY_HEADS, WIDTH)}
    check_operator(operator, formula, some, torch.float32, npu)


def test_statistics_give_the_logsumexp(npu: torch.device) -> None:
    some = {name: value.float() for name, value in inputs().items()}
    _, maximum, total, *_ = torch_npu.npu_fusion_attention(
        *(value.to(npu) for value in some.values()), HEADS, "BNSD", scale=SCALE
    )
    scores = SCALE * some["query"] @ some["key"].repeat_interleave(2, 1).mT
    expect_close((maximum + total.log())[..., 0], scores.double().logsumexp(-1), torch.float32)
    assert (maximum == maximum[..., :1]).all()


def test_dropout_is_the_same_in_backward_and_for_the_same_state(npu: torch.device) -> None:
    query, key = torch.zeros(1, 1, 3, 4, device=npu), torch.zeros(1, 1, 64, 4, device=npu)
    value = torch.eye(64, device=npu)[None, None, :, :4].contiguous().requires_grad_()
    torch.manual_seed(3)
    results = torch_npu.npu_fusion_attention(query, key, value, 1, "BNSD", keep_prob=0.5)
    torch.manual_seed(3)
    again = torch_npu.npu_fusion_attention(query, key, value, 1, "BNSD", keep_prob=0.5)
    assert torch.equal(results[0], again[0])
    assert results[6] == 3 * 64
    results[0].sum().backward()
    # out[i, d] = kept[i, d] / 32, so the gradient of value's row d sums the kept weights of key d.
    expected = results[0].detach()[0, 0].sum(0)
    torch.testing.assert_close(value.grad[0, 0, :4, 0], expected)
    kept = (value.grad[0, 0, :, 0] * 32).sum().item() / (3 * 64)
    assert 0.3 < kept < 0.7


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_scaled_dot_product_attention(causal: bool, dtype: torch.dtype, npu: torch.device) -> None:
    """Fused, with GQA although enable_gqa is False."""
    hidden = band(5, 7, 0, 99, 0) if causal else None
    check_operator(
        lambda query, key, value: F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=SCALE),
        lambda **some: exact(**some, hidden=hidden),
        inputs(),
        dtype,
        npu,
    )


def test_scaled_dot_product_attention_masks(npu: torch.device) -> None:
    q = randn(2, 4, 5, 8).float().to(npu)
    keep = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    keep[0, 0, 1] = False
    keep[1, 0, :, 3:] = False
    fused_out = F.scaled_dot_product_attention(q, q, q, keep.to(npu))
    expected = F.scaled_dot_product_attention(q.cpu(), q.cpu(), q.cpu(), keep).nan_to_num(0.0)
    # A query without any key: the older way to the operator asks for no zeros.
    expected[0, :, 1] = 0.0 if has_operator("npu_fusion_attention_v3") else q[0].cpu().mean(1)
    torch.testing.assert_close(fused_out.cpu(), expected)
    with pytest.raises(RuntimeError, match=r"is_causal|attn_mask"):
        F.scaled_dot_product_attention(q, q, q, keep.to(npu), is_causal=True)


def test_scaled_dot_product_attention_with_a_float_mask_is_not_fused(npu: torch.device) -> None:
    from npu_patch import simulator

    q, bias = randn(2, 4, 5, 8).float(), randn(5, 5).float()
    with simulator.count() as counted:
        actual = F.scaled_dot_product_attention(q.to(npu), q.to(npu), q.to(npu), bias.to(npu))
    assert not any("attention" in name for name in counted.by_op)
    torch.testing.assert_close(actual.cpu(), F.scaled_dot_product_attention(q, q, q, bias))


def test_default_scale_is_one(npu: torch.device) -> None:
    some = [value.float() for value in inputs().values()]
    actual = torch_npu.npu_fusion_attention(*(value.to(npu) for value in some), HEADS, "BNSD")[0]
    expected = exact(some[0].double() / SCALE, some[1].double(), some[2].double())
    expect_close(actual, expected, torch.float32)
    assert not math.isclose(SCALE, 1.0)
