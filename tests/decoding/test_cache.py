"""Static caches: lengths that share one, starting over, and what a step changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from npu_patch.decoding import cache as caches
from tests.support.tiny_models import tiny


@pytest.mark.parametrize(
    "length, expected", [(1, 64), (64, 64), (65, 128), (500, 512), (513, 640), (1025, 1280), (4096, 4096), (4097, 5120)]
)
def test_a_bucket_holds_the_length_and_wastes_a_quarter_at_most(length: int, expected: int) -> None:
    assert caches.bucket(length) == expected


def test_every_length_fits_into_its_bucket_and_buckets_are_few() -> None:
    found = [caches.bucket(length) for length in range(1, 9000)]
    assert all(bucket >= length for length, bucket in enumerate(found, 1))
    assert all(bucket <= max(64, 1.25 * length) or bucket - length < 64 for length, bucket in enumerate(found, 1))
    assert len(set(found)) < 30 and found == sorted(found)


def filled(family: str) -> tuple[Any, Any, torch.Tensor]:
    """A model, a cache of its own kind, and the logits of a prompt that it holds."""
    model = tiny(family)
    cache = caches.made(model.config, 64)
    return model, cache, prefilled(model, cache)


@torch.no_grad()
def prefilled(model: Any, cache: Any, length: int = 7) -> torch.Tensor:
    found: torch.Tensor = model(torch.arange(2, 2 + length)[None], past_key_values=cache, use_cache=True).logits
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5", "gemma3"])
def test_a_cache_starts_over_as_a_new_one_at_its_addresses(family: str) -> None:
    model, cache, first = filled(family)
    addresses = caches.addresses(cache)
    caches.start_over(cache)
    assert type(cache.get_seq_length()) is int and cache.get_seq_length() == 0
    assert not any(bool(layer.keys.any()) for layer in cache.layers if vars(layer).get("keys") is not None)
    assert torch.equal(prefilled(model, cache), first)
    assert caches.addresses(cache) == addresses and caches.tokens_in(cache) == 7
    assert not any("lazy_initialization" in vars(layer) for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_what_a_step_changed_is_put_back(family: str) -> None:
    model, cache, _ = filled(family)
    token = torch.tensor([[5]])
    before = caches.Before.of(cache)
    first = model(token, past_key_values=cache, use_cache=True).logits
    assert before.counted_by_the_host(cache) is None
    before.put_back(cache)
    assert caches.tokens_in(cache) == 7
    assert torch.equal(model(token, past_key_values=cache, use_cache=True).logits, first)


@torch.no_grad()
def test_what_the_host_counts_is_named_and_put_back() -> None:
    model = tiny("gemma3")
    cache = StaticCache(config=model.config, max_cache_len=64)
    prefilled(model, cache, 5)
    before = caches.Before.of(cache)
    model(torch.tensor([[5]]), past_key_values=cache, use_cache=True)
    reason = before.counted_by_the_host(cache)
    assert reason == "StaticSlidingWindowLayer.cumulative_length_int changes on the host with each token"
    before.put_back(cache)
    assert cache.layers[0].cumulative_length_int == 5


def test_windows_far_smaller_than_the_cache_are_left_to_transformers() -> None:
    config = tiny("gemma3").config
    assert "windows" in caches.made(config, 8 * config.sliding_window + 1)
    assert caches.made(config, 8 * config.sliding_window).is_sliding == [True, False]
