"""Inference operators of the simulated NPU: fused, prompt and incremental attention, and the gated delta rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch.simulator import Refused
from tests.simulator.fused.test_attention import TRIANGLE, band
from tests.simulator.fused.test_fused import expect_close, randn
from tests.support.torch_npu_operators import needs_operator

pytestmark = pytest.mark.usefixtures("simulated")

HALF = [torch.bfloat16, torch.float16]
HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 16, 0.3


def exact(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None) -> Tensor:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1).double(), value.repeat_interleave(group, 1).double()
    scores = query.double() @ key.mT * SCALE
    if hidden is not None:
        scores = scores.masked_fill(hidden, -1e30)
    return scores.softmax(-1) @ value


def inputs(queries: int, keys: int, dtype: torch.dtype, width: int = WIDTH) -> tuple[Tensor, Tensor, Tensor]:
    return (
        randn(2, HEADS, queries, width).to(dtype),
        randn(2, KEY_HEADS, keys, width, seed=1).to(dtype),
        randn(2, KEY_HEADS, keys, width, seed=2).to(dtype),
    )


def fused_infer(*tensors: Tensor, layout: str = "BNSD", **options: Any) -> tuple[Tensor, Tensor]:
    return torch_npu.npu_fused_infer_attention_score(
        *(x.to("npu:0") for x in tensors),
        num_heads=HEADS, num_key_value_heads=KEY_HEADS, scale=SCALE, input_layout=layout, **options,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "BNSD_BSND"])
def test_fused_infer_layouts(layout: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(5, 7, dtype)
    to = {
        "BNSD": lambda x: x,
        "BNSD_BSND": lambda x: x,
        "BSND": lambda x: x.transpose(1, 2).contiguous(),
        "BSH": lambda x: x.transpose(1, 2).flatten(2).contiguous(),
    }[layout]
    out, lse = fused_infer(to(q), to(k), to(v), layout=layout, softmax_lse_flag=True)
    expected = exact(q, k, v)
    expected = expected.transpose(1, 2) if layout == "BNSD_BSND" else to(expected)
    expect_close(out, expected, dtype)
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT * SCALE
    expect_close(lse, scores.logsumexp(-1, keepdim=True), torch.float32)


def test_fused_infer_masks_lengths_and_sinks() -> None:
    q, k, v = inputs(5, 7, torch.bfloat16)
    out, lse = fused_infer(q, k, v, atten_mask=TRIANGLE.to("npu:0"), sparse_mode=3)
    expect_close(out, exact(q, k, v, band(5, 7, 2, 99, 0)), torch.bfloat16)
    assert lse.numel() == 0
    out, _ = fused_infer(q, k, v, sparse_mode=3)
    expect_close(out, exact(q, k, v), torch.bfloat16)
    out, _ = fused_infer(q, k, v, actual_seq_lengths=[5, 3], actual_seq_lengths_kv=[7, 4])
    expect_close(out[0], exact(q, k, v)[0], torch.bfloat16)
    expect_close(out[1, :, :3], exact(q, k[:, :, :4], v[:, :, :4])[1, :, :3], torch.bfloat16)
    assert out[1, :, 3:].isnan().all()
    sink = torch.full((HEADS,), 50.0, device="npu:0")  # takes all of the probability
    out, _ = torch_npu.npu_fused_infer_attention_score_v2(
        *(x.to("npu:0") for x in (q, k, v)), num_query_heads=HEADS, num_key_value_heads=KEY_HEADS,
        softmax_scale=SCALE, input_layout="BNSD", learnable_sink=sink,
    )  # fmt: skip
    assert out.abs().max() < 1e-6


def test_fused_infer_packed() -> None:
    q, k = randn(9, HEADS, 128).bfloat16(), randn(9, KEY_HEADS, 128).bfloat16()
    out, _ = fused_infer(q, k, k, layout="TND", actual_seq_lengths=[4, 9], actual_seq_lengths_kv=[4, 9])
    second = exact(*(x[4:].transpose(0, 1)[None] for x in (q, k, k)))[0].transpose(0, 1)
    expect_close(out[4:], second, torch.bfloat16)


def test_decoding_ignores_the_sparse_mode_and_reads_pages() -> None:
    q, k, v = inputs(1, 40, torch.bfloat16)
    hidden = torch.zeros(2, 1, 1, 40, dtype=torch.bool)
    hidden[1, ..., :5] = True  # left padding
    out, _ = fused_infer(q, k, v, atten_mask=hidden.to("npu:0"), sparse_mode=3)
    expected = exact(q, k, v, hidden)
    expect_close(out, expected, torch.bfloat16)
    incremental = torch_npu.npu_incre_flash_attention(
        *(x.to("npu:0") for x in (q, k, v)), atten_mask=hidden.to("npu:0"), num_heads=HEADS, scale_value=SCALE,
        num_key_value_heads=KEY_HEADS, input_layout="BNSD",
    )  # fmt: skip
    expect_close(incremental, expected, torch.bfloat16)

    table = torch.tensor([[5, 2, 0], [1, 4, 3]], dtype=torch.int32)
    pages = []
    for tensor in (k, v):
        cache = torch.full((6, 16, KEY_HEADS * WIDTH), torch.nan, dtype=torch.bfloat16)
        for entry in range(2):
            rows = tensor[entry].transpose(0, 1).flatten(1)
            for page in range(3):
                part = rows[page * 16 : (page + 1) * 16]
                cache[table[entry, page], : len(part)] = part
        pages.append(cache)
    out, _ = fused_infer(q, *pages, block_table=table.to("npu:0"), block_size=16, actual_seq_lengths_kv=[40, 33])
    expect_close(out[0], exact(q, k, v)[0], torch.bfloat16)
    expect_close(out[1], exact(q, k[:, :, :33], v[:, :, :33])[1], torch.bfloat16)


def test_prompt_attention() -> None:
    q, k, v = (x.to("npu:0") for x in inputs(5, 5, torch.float16))
    causal = band(5, 5, 0, 99, 0)
    options = {"num_heads": HEADS, "num_key_value_heads": KEY_HEADS, "scale_value": SCALE, "input_layout": "BNSD"}
    out = torch_npu.npu_prompt_flash_attention(q, k, v, atten_mask=causal.to("npu:0"), **options)
    expect_close(out, exact(q.cpu(), k.cpu(), v.cpu(), causal), torch.float16)
    with pytest.raises(Refused, match="next_tokens=0 skip keys"):
        torch_npu.npu_prompt_flash_attention(q, k, v, atten_mask=torch.zeros_like(causal).to("npu:0"), **options)


@pytest.mark.parametrize("pse_type", [0, 1])
def test_fusion_attention_v2_adds_pse_before_or_after_scaling(pse_type: int) -> None:
    from tests.simulator.fused import test_attention as training

    some = {**training.inputs(), "pse": randn(2, HEADS, 5, 7)}
    training.check_operator(
        lambda query, key, value, pse: torch_npu.npu_fusion_attention_v2(
            query, key, value, HEADS, "BNSD", scale=training.SCALE, pse=pse, pse_type=pse_type
        )[0],
        lambda **given: training.exact(**given, pse_last=pse_type == 0),
        some,
        torch.float32,
        torch.device("npu:0"),
    )


# ---- gated delta rule ----


def delta_inputs(tokens: int) -> dict[str, Tensor]:
    key = torch.nn.functional.normalize(randn(tokens, 2, 6), dim=-1)
    return {
        "query": randn(tokens, 2, 6, seed=3).bfloat16(),
        "key": key.bfloat16(),
        "value": randn(tokens, 4, 10).bfloat16(),
        "beta": randn(tokens, 4).sigmoid().bfloat16(),
        "g": -randn(tokens, 4, seed=4).sigmoid().float(),
    }


def exact_delta(state: Tensor, query: Tensor, key: Tensor, value: Tensor, beta: Tensor, g: Tensor) -> Any:
    """state [Nv, Dv, Dk] in float64, one head at a time, as the matrix formula is documented."""
    outs = torch.zeros_like(value, dtype=torch.float64)
    state = state.double().clone()
    for token in range(len(query)):
        for head in range(4):
            q, k = query[token, head // 2].double(), key[token, head // 2].double()
            b, v = beta[token, head].double(), value[token, head].double()
            forget = torch.eye(6, dtype=torch.float64) - b * torch.outer(k, k)
            state[head] = g[token, head].double().exp() * state[head] @ forget + b * torch.outer(v, k)
            outs[token, head] = state[head] @ (0.4 * q)
    return outs, state


@needs_operator("npu_chunk_gated_delta_rule")
def test_chunk_gated_delta_rule(npu: torch.device) -> None:
    some, states = delta_inputs(7), randn(2, 4, 10, 6).bfloat16()
    lengths = torch.tensor([3, 4], dtype=torch.int32, device=npu)
    given = {name: value.to(npu) for name, value in some.items()}
    out, final = torch_npu.npu_chunk_gated_delta_rule(
        **given, initial_state=states.to(npu), actual_seq_lengths=lengths, scale=0.4
    )
    for index, part in enumerate((slice(0, 3), slice(3, 7))):
        expected, state = exact_delta(states[index], **{name: value[part] for name, value in some.items()})
        expect_close(out[part], expected, torch.bfloat16)
        expect_close(final[index], state, torch.bfloat16)


def test_recurrent_gated_delta_rule_changes_the_states(npu: torch.device) -> None:
    some, states = delta_inputs(3), randn(5, 4, 10, 6).bfloat16()
    pool = states.to(npu)
    out = torch_npu.npu_recurrent_gated_delta_rule(
        **{name: value.to(npu) for name, value in some.items()},
        state=pool,
        scale=0.4,
        actual_seq_lengths=torch.tensor([1, 2], dtype=torch.int32, device=npu),
        ssm_state_indices=torch.tensor([3, 1, 1], dtype=torch.int32, device=npu),
    )
    for block, part in ((3, slice(0, 1)), (1, slice(1, 3))):
        expected, state = exact_delta(states[block], **{name: value[part] for name, value in some.items()})
        expect_close(out[part], expected, torch.bfloat16)
        expect_close(pool[block], state, torch.bfloat16)
    assert torch.equal(pool[[0, 2, 4]].cpu(), states[[0, 2, 4]])


def delta(**changes: Any) -> Any:
    some: dict[str, Any] = {name: value.to("npu:0") for name, value in delta_inputs(3).items()}
    some |= {
        "initial_state": torch.zeros(1, 4, 10, 6, dtype=torch.bfloat16, device="npu:0"),
        "actual_seq_lengths": torch.tensor([3], dtype=torch.int32, device="npu:0"),
        "scale": 1.0,
    }
    return torch_npu.npu_chunk_gated_delta_rule(**{**some, **changes})


def infer(queries: int = 5, width: int = WIDTH, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return fused_infer(*inputs(queries, 7, dtype, width), **options)


REFUSALS: list[tuple[str, Callable[[], Any], str]] = [
    ("float32", lambda: infer(dtype=torch.float32), "dtype of query"),
    ("D not a multiple of 16", lambda: infer(width=24), "multiple of 16"),
    ("strided", lambda: fused_infer(*(x.mT for x in inputs(16, 16, torch.bfloat16))), "contiguous"),
    ("mask", lambda: infer(atten_mask=torch.zeros(1, 4, 5, 7, dtype=torch.bool, device="npu:0")), "atten_mask"),
    ("causal, full mask", lambda: infer(atten_mask=band(5, 7, 0, 9, 0).to("npu:0"), sparse_mode=3), "2048"),
    ("TND width", lambda: fused_infer(*(randn(9, n, 64).bfloat16() for n in (4, 2, 2)), layout="TND",
        actual_seq_lengths=[9], actual_seq_lengths_kv=[9]), "D=128"),
    ("quantised", lambda: infer(antiquant_scale=torch.ones(1, device="npu:0")), "antiquant_scale is not simulated"),
    ("too long", lambda: infer(actual_seq_lengths_kv=[8, 7]), "at most 7"),
    ("two rows", lambda: torch_npu.npu_incre_flash_attention(
        *(x.to("npu:0") for x in inputs(2, 7, torch.bfloat16)), num_heads=4, input_layout="BNSD"), "Sq = 1"),
    ("g below -1", lambda: delta(g=torch.full((3, 4), -1.5, device="npu:0")), "within -1 and 0"),
    ("state transposed", lambda: delta(
        initial_state=torch.zeros(1, 4, 6, 10, dtype=torch.bfloat16, device="npu:0")), "Nv, Dv, Dk"),
    ("no state", lambda: delta(initial_state=None), "initial_state is needed"),
    ("lengths cumulative", lambda: delta(
        actual_seq_lengths=torch.tensor([4], dtype=torch.int32, device="npu:0")), "add up to T=3"),
]  # fmt: skip


# Those by delta().
OF_THE_DELTA_RULE = ("g below -1", "state transposed", "no state", "lengths cumulative")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        pytest.param(
            *case, id=name, marks=needs_operator("npu_chunk_gated_delta_rule") if name in OF_THE_DELTA_RULE else ()
        )
        for name, *case in REFUSALS
    ],
)
def test_is_refused(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(Refused) as refusal:
        call()
    assert str(refusal.value).startswith("npu_")
    assert words in str(refusal.value)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("dtype", HALF)
def test_fused_infer_adds_a_bias_to_the_scaled_scores(dtype: torch.dtype, samples: int) -> None:
    q, k, v = inputs(1, 9, dtype)
    bias = randn(samples, HEADS, 1, 9, seed=3).to(dtype)
    out, _ = fused_infer(q, k, v, pse_shift=bias.to("npu:0"))
    scores = q.double() @ k.repeat_interleave(2, 1).double().mT * SCALE + bias.double()
    expect_close(out, scores.softmax(-1) @ v.repeat_interleave(2, 1).double(), dtype)


def test_fused_infer_refuses_a_bias_of_fewer_heads() -> None:
    q, k, v = inputs(1, 9, torch.float16)
    with pytest.raises(Refused, match=r"pse_shift must be one of .*2, 4, 1, 9.*, not \[1, 1, 1, 9\]"):
        fused_infer(q, k, v, pse_shift=randn(1, 1, 1, 9).half().to("npu:0"))
