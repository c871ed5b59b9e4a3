"""Attention over a paged cache, the operator that fills it, and the limits that both have by their documentation."""

from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor

from npu_patch.simulator import Refused
from tests.simulator.test_graphs import captured
from tests.support.torch_npu_operators import needs_argument

pytestmark = pytest.mark.usefixtures("simulated")

HEADS, KEY_HEADS, WIDTH = 4, 2, 16
OPERATORS = {
    "npu_fused_infer_attention_score": ("actual_seq_lengths_kv", {"num_heads": HEADS, "scale": 0.25}),
    "npu_fused_infer_attention_score_v2": ("actual_seq_kvlen", {"num_query_heads": HEADS, "softmax_scale": 0.25}),
    "npu_incre_flash_attention": ("actual_seq_lengths", {"num_heads": HEADS, "scale_value": 0.25}),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def attend(
    operator: str, q: Tensor, k: Tensor, v: Tensor, lengths: list[int] | None, layout: str = "BNSD", **some: Any
) -> Tensor:
    of_keys, options = OPERATORS[operator]
    options = {**options, "num_key_value_heads": KEY_HEADS, "input_layout": layout, of_keys: lengths, **some}
    result = getattr(torch_npu, operator)(*(x.to("npu:0") for x in (q, k, v)), **options)
    return result[0] if isinstance(result, tuple) else result


def in_pages(tensor: Tensor, table: Tensor, blocks: int, size: int, by_head: bool) -> Tensor:
    """[B, N, S, D] as a cache whose unused rows are NaN."""
    cache = torch.full((blocks, size, KEY_HEADS, WIDTH), torch.nan, dtype=tensor.dtype)
    for entry, rows in enumerate(tensor.transpose(1, 2)):
        for page, part in enumerate(rows.split(size)):
            cache[table[entry, page], : len(part)] = part
    return cache.transpose(1, 2).contiguous() if by_head else cache.flatten(2)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize(
    ("layout", "queries", "size", "by_head"),
    [
        ("BNSD", 1, 16, False), ("BNSD", 1, 16, True), ("BSH", 1, 32, False), ("BSND", 1, 128, False),
        ("BNSD", 3, 128, True), ("BSH", 3, 128, False),
    ],
)  # fmt: skip
def test_pages_give_what_the_whole_keys_give(
    operator: str, layout: str, queries: int, size: int, by_head: bool
) -> None:
    if operator == "npu_incre_flash_attention" and queries > 1:
        pytest.skip("the operator takes one query row")
    to = {
        "BNSD": lambda x: x,
        "BSND": lambda x: x.transpose(1, 2).contiguous(),
        "BSH": lambda x: x.transpose(1, 2).flatten(2).contiguous(),
    }[layout]
    longest, lengths = 2 * size + 8, [2 * size + 8, size + 1]
    q, k, v = (
        random(2, n, s, WIDTH, seed=n + s) for n, s in ((HEADS, queries), (KEY_HEADS, longest), (KEY_HEADS, longest))
    )
    table = torch.tensor([[5, 2, 0, -1], [1, 4, 3, -1]], dtype=torch.int32)  # the last column is unused
    pages = [in_pages(x, table, 6, size, by_head) for x in (k, v)]
    got = attend(operator, to(q), *pages, lengths, layout, block_table=table.to("npu:0"), block_size=size)
    assert torch.equal(got, attend(operator, to(q), to(k), to(v), lengths, layout))


def test_a_mask_over_pages_reaches_the_end_of_the_table() -> None:
    q, k, v = (
        random(1, HEADS, 1, WIDTH),
        random(1, KEY_HEADS, 20, WIDTH, seed=1),
        random(1, KEY_HEADS, 20, WIDTH, seed=2),
    )
    table = torch.tensor([[1, 0]], dtype=torch.int32)
    pages = [in_pages(x, table, 2, 16, False) for x in (k, v)]
    mask = torch.zeros(1, 1, 1, 40, dtype=torch.bool)
    mask[..., 3:7] = True
    options = {"block_table": table.to("npu:0"), "block_size": 16}
    name = "npu_fused_infer_attention_score"
    got = attend(name, q, *pages, [20], atten_mask=mask.to("npu:0"), **options)
    assert torch.equal(got, attend(name, q, k, v, [20], atten_mask=mask[..., :20].contiguous().to("npu:0")))
    with pytest.raises(Refused, match="atten_mask must reach the end of block_table, 32 keys, not 20"):
        attend(name, q, *pages, [20], atten_mask=mask[..., :20].contiguous().to("npu:0"), **options)


def refused_attention(
    queries: int = 1, size: int = 16, layout: str = "BNSD", cache: tuple[int, ...] = (4, 16, 32),
    table: tuple[tuple[int, ...], ...] = ((0, 1), (2, 3)), lengths: list[int] | None = [20, 20],  # noqa: B006
    value: tuple[int, ...] | None = None, dtype: torch.dtype = torch.int32, **some: Any,
) -> None:  # fmt: skip
    q = {
        "BNSD": random(2, HEADS, queries, WIDTH),
        "BSH": random(2, queries, HEADS * WIDTH),
        "TND": random(2, HEADS, WIDTH),
    }[layout]
    keys, values = (torch.zeros(shape, dtype=torch.bfloat16) for shape in (cache, value or cache))
    blocks = torch.tensor(table, dtype=dtype).to("npu:0")
    attend(
        "npu_fused_infer_attention_score", q, keys, values, lengths, layout, block_table=blocks, block_size=size, **some
    )


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"size": 24}, "block_size must be a multiple of 16 up to 512 for one query row, not 24"),
        ({"size": 0}, "block_size must be a multiple of 16 up to 512 for one query row, not 0"),
        ({"size": 528}, "block_size must be a multiple of 16 up to 512 for one query row, not 528"),
        ({"queries": 2}, "block_size must be a multiple of 128 up to 512 for many query rows, not 16"),
        ({"layout": "TND"}, "block_table with TND is not simulated"),
        ({"dtype": torch.int64}, "the dtype of block_table must be one of int32, not int64"),
        ({"table": ((0, 1),)}, r"block_table must be \[2, blocks of an entry\], not \[1, 2\]"),
        ({"table": ((0,), (1,))}, "actual_seq_lengths_kv must be one length of at most 16 for each entry"),
        ({"table": ((0, 1), (2, 4))}, "block_table row 1 points beyond the 4 blocks of the cache"),
        ({"table": ((0, -1), (2, 3))}, "block_table row 0 points beyond the 4 blocks of the cache"),
        ({"lengths": None}, "block_table needs actual_seq_lengths_kv"),
        ({"cache": (3, 16, 32)}, "as many blocks as the entries need together, 4, not 3"),
        ({"cache": (4, 32, 32)}, r"the cache must be \[blocks, 16, H\] .*, not \[4, 32, 32\]"),
        ({"cache": (4, 2, 32, 16)}, r"or for query in BNSD \[blocks, N, 16, D\], not \[4, 2, 32, 16\]"),
        ({"cache": (4, 2, 16, 16), "layout": "BSH"}, r"for query in BNSD \[blocks, N, 16, D\], not \[4, 2, 16, 16\]"),
        ({"cache": (4, 16, 65536)}, "needs H <= 65535, not 65536"),
        ({"value": (5, 16, 32)}, r"paged key \[4, 16, 32\] and value \[5, 16, 32\] must be alike"),
        ({"antiquant_mode": 1}, "antiquant_mode is not simulated"),
    ],
)  # fmt: skip
def test_paged_attention_refuses(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(Refused, match=f"npu_fused_infer_attention_score: .*{rule}"):
        refused_attention(**change)


scatter = needs_argument("npu_scatter_pa_kv_cache", "cache_mode")


def fill(
    slots: list[int], cache: tuple[int, ...] = (3, 4, 2, 8), key: tuple[int, ...] = (3, 2, 8),
    mode: str | None = "Norm", dtype: torch.dtype = torch.int32, value_cache: tuple[int, ...] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    keys, values = random(*key).to("npu:0"), random(*key, seed=1).to("npu:0")
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device="npu:0") for shape in (cache, value_cache or cache)]
    torch_npu.npu_scatter_pa_kv_cache(
        keys, values, *caches, torch.tensor(slots, dtype=dtype).to("npu:0"), cache_mode=mode
    )
    return keys, values, *caches


@scatter
@pytest.mark.parametrize("mode", ["Norm", None])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_new_tokens_go_to_their_slots(mode: str | None, dtype: torch.dtype) -> None:
    slots = [9, 0, 6]
    key, value, key_cache, value_cache = fill(slots, mode=mode, dtype=dtype)
    for new, cache in ((key, key_cache), (value, value_cache)):
        wanted = torch.zeros_like(cache).flatten(0, 1)
        wanted[slots] = new
        assert torch.equal(cache.flatten(0, 1), wanted)


@scatter
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"mode": "PA_NZ"}, "cache_mode='PA_NZ' is not simulated, only 'Norm'"),
        ({"slots": [1, 1, 2]}, r"the slots of slot_mapping must differ, not \[1, 1, 2\]"),
        ({"slots": [0, 1, 12]}, r"slot_mapping must be from 0 to 11, not \[0, 1, 12\]"),
        ({"slots": [0, 1, -1]}, r"slot_mapping must be from 0 to 11, not \[0, 1, -1\]"),
        ({"slots": [0, 1]}, r"slot_mapping must be \[3\], a slot for each token, not \[2\]"),
        ({"dtype": torch.float32}, "the dtype of slot_mapping must be one of int32, int64, not float32"),
        ({"key": (3, 1, 2, 8)}, r"key and value must be \[T, N, D\]"),
        ({"cache": (3, 4, 16)}, r"key_cache must be \[blocks, block_size, 2, 8\], not \[3, 4, 16\]"),
        ({"value_cache": (2, 4, 2, 8)}, r"value_cache must be \[blocks, block_size, 2, 8\], not \[2, 4, 2, 8\]"),
    ],
)
def test_filling_a_paged_cache_refuses(change: dict[str, Any], rule: str) -> None:
    with pytest.raises(Refused, match=f"npu_scatter_pa_kv_cache: {rule}"):
        fill(**{"slots": [9, 0, 6], **change})


@scatter
def test_a_paged_decode_is_captured_with_buffers_that_are_filled_later() -> None:
    size, steps = 16, 20
    table = torch.full((2, 2), -1, dtype=torch.int32, device="npu:0")
    slots = torch.zeros(2, dtype=torch.int64, device="npu:0")  # equal: a call of now would be refused
    caches = [torch.zeros(4, size, KEY_HEADS, WIDTH, dtype=torch.bfloat16, device="npu:0") for _ in range(2)]
    token = torch.zeros(2, HEADS * WIDTH, dtype=torch.bfloat16, device="npu:0")
    name = "npu_fused_infer_attention_score"

    def step(lengths: list[int]) -> Tensor:
        new = token.view(2, HEADS, WIDTH)[:, :KEY_HEADS].contiguous()
        torch_npu.npu_scatter_pa_kv_cache(new, new, *caches, slots, cache_mode="Norm")
        pages = [cache.flatten(2) for cache in caches]
        query = token.view(2, HEADS, 1, WIDTH)
        return attend(name, query, *pages, lengths, block_table=table, block_size=size)

    graph, result = captured(lambda: step([1, 2]), auto_dispatch_capture=True)
    assert not any(cache.any() for cache in caches)
    table.copy_(torch.tensor([[3, 1], [0, 2]], dtype=torch.int32))
    rows: list[Tensor] = [torch.zeros(2, 0, KEY_HEADS, WIDTH).bfloat16()]
    for position in range(steps):
        token.copy_(random(2, HEADS * WIDTH, seed=position))
        page = table.cpu()[:, position // size].long()
        slots.copy_(page * size + position % size)
        rows.append(token.cpu().view(2, 1, HEADS, WIDTH)[:, :, :KEY_HEADS])
        graph.update(cpu_update_input=[{"actual_seq_lengths_kv": [position + 1] * 2}])
        graph.replay()
        whole = torch.cat(rows, 1).transpose(1, 2).contiguous()
        assert torch.equal(result, attend(name, token.view(2, HEADS, 1, WIDTH), whole, whole, [position + 1] * 2))
