"""Attention over pages: the operator against its definition in float64, its limits, and where new keys are written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from npu_patch.measuring.measure import check
from npu_patch.numerics.closeness import difference
from npu_patch.ops.attention.paged import PAGED_ATTENTION, Paged, exact, why_no_cache, why_no_pages, write
from npu_patch.ops.attention.paged_cases import case, scattered
from npu_patch.serving.case import Alternative

(IMPLEMENTATION,) = PAGED_ATTENTION.implementations
PAGES = 6


def inputs(dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    cache = PAGES + 1, size, key_heads, head_dim
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, heads, head_dim), cache, cache)]
    return made[0], made[1], made[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads, key_heads, head_dim", [(6, 2, 16), (4, 4, 64), (8, 1, 128)])
@pytest.mark.parametrize("size", [16, 48, 128, 256])
def test_it_is_as_near_to_float64_as_a_rounding_of_it(
    dtype: torch.dtype, heads: int, key_heads: int, head_dim: int, size: int, npu: torch.device
) -> None:
    tensors = inputs(dtype, heads, key_heads, head_dim, size)
    paged, on_device = (scattered(PAGES, device, 0.3, size) for device in ("cpu", npu))
    moved = [each.to(npu) for each in tensors]
    assert IMPLEMENTATION.unsupported(*moved, on_device) is None
    expected = exact(*(each.double() for each in tensors), paged)
    found = IMPLEMENTATION.run(*moved, on_device).cpu()
    assert found.dtype == dtype and found.shape == expected.shape
    assert difference(found.double(), expected) <= 1.1 * torch.finfo(dtype).eps


def test_its_definition_is_attention_over_the_keys_that_the_pages_hold() -> None:
    query, keys, values = (each.double() for each in inputs(torch.float32, 6, 2, 16, 16))
    sink = torch.randn(6, dtype=torch.float64)
    for paged in (scattered(PAGES, "cpu", 0.3, 16), replace(scattered(PAGES, "cpu", 0.3, 16), sink=sink, softcap=2.0)):
        found = exact(query, keys, values, paged)
        for row, length in enumerate(paged.lengths):
            own = [each[paged.table[row].long()].flatten(0, 1)[:length] for each in (keys, values)]
            for head in range(6):
                scores = own[0][:, head // 3] @ query[row, head] * 0.3
                if paged.softcap is not None:
                    scores = torch.cat((2.0 * torch.tanh(scores / 2.0), sink[head : head + 1]))
                weights = scores.softmax(0)[:length]
                torch.testing.assert_close(found[row, head], weights @ own[1][:, head // 3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_checked_on_a_device_finds_it_right_and_one_that_forgets_the_table_wrong(
    dtype: torch.dtype, npu: torch.device
) -> None:
    def first_pages(query: Tensor, keys: Tensor, values: Tensor, paged: Paged) -> Tensor:
        in_order = torch.arange(paged.table.numel(), device=query.device, dtype=torch.int32).view_as(paged.table)
        return IMPLEMENTATION.run(query, keys, values, replace(paged, table=in_order))

    asked = case(6, 2, 16, dtype)
    assert check(asked, Alternative("it", IMPLEMENTATION.run), npu).wrong is None
    assert check(asked, Alternative("forgetful", first_pages), npu).wrong is not None


@pytest.mark.parametrize(
    "shape, dtype, heads, words",
    [
        ((4, 256, 2, 16), torch.float32, 4, "a cache of float32: the operator takes float16 and bfloat16"),
        ((4, 24, 2, 16), torch.float16, 4, "pages of 24 tokens: the operator takes multiples of 16 up to 512"),
        ((4, 1024, 2, 16), torch.float16, 4, "pages of 1024 tokens"),
        ((4, 256, 2, 24), torch.float16, 4, "heads of 24: the operator takes multiples of 16 up to 512"),
        ((4, 256, 1, 16), torch.float16, 128, "128 query heads for 1 key heads: the operator takes up to 64 for each"),
        ((4, 16, 256, 256), torch.float16, 256, "256 key heads of 256: the operator takes 65535 numbers a token"),
        ((8192, 256, 8, 128), torch.float16, 8, "2\\*\\*31 numbers"),
    ],
)
def test_a_cache_beyond_its_limits_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, heads: int, words: str
) -> None:
    with pytest.raises(AssertionError, match=words):
        assert why_no_cache(torch.empty(shape, dtype=dtype, device="meta"), heads) is None


def test_a_cache_within_its_limits_is_taken() -> None:
    assert why_no_cache(torch.empty((8191, 256, 8, 128), dtype=torch.float16, device="meta"), 64) is None
    assert why_no_pages(16) is why_no_pages(512) is None


def test_calls_that_the_operator_does_not_take_are_refused_with_the_reason(npu: torch.device) -> None:
    tensors = [each.to(npu) for each in inputs(torch.float16, 6, 2, 16, 16)]
    paged = scattered(PAGES, npu, 0.3, 16)
    shared = replace(paged, lengths=(32, 32, 64))
    assert "more pages than the cache has" in IMPLEMENTATION.unsupported(*tensors, shared)
    assert IMPLEMENTATION.unsupported(*tensors, replace(paged, sink=torch.ones(6))) == "attention sinks"
    assert IMPLEMENTATION.unsupported(*tensors, replace(paged, softcap=3.0)) == "softcap"
    assert "float32 beside" in IMPLEMENTATION.unsupported(tensors[0].float(), *tensors[1:], paged)


@pytest.mark.parametrize("differ", [True, False])
def test_new_keys_and_values_are_written_to_their_slots_and_nowhere_else(differ: bool, npu: torch.device) -> None:
    _, keys, values = (each.to(npu) for each in inputs(torch.bfloat16, 6, 2, 16, 16))
    before = keys.cpu(), values.cpu()
    key, value = torch.randn(2, 3, 2, 16).to(npu, torch.bfloat16)
    slots = torch.tensor([5, 16 * 3 + 15, 16 * 6])
    write(key, value, keys, values, slots.to(npu), differ)
    for cache, was, new in ((keys, before[0], key), (values, before[1], value)):
        expected = was.flatten(0, 1).index_copy(0, slots, new.cpu())
        assert torch.equal(cache.cpu().flatten(0, 1), expected)
