"""A static cache's `update` for one token, and how models decode over it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StaticCache, cache_utils

from npu_patch import applied, restore, simulator
from npu_patch.ops.readings import NotRead
from npu_patch.probe.static_cache import WRITTEN, read
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from tests.support.tiny_models import tiny

LENGTH = 40


def of_cache(report: Report) -> Outcome:
    (found,) = (each for each in report if each.patch == "static_cache" and each.site.endswith("StaticLayer.update"))
    return found


def greedy(model: torch.nn.Module, ids: Tensor, cache: Any, tokens: int, **given: Any) -> list[list[int]]:
    options = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens, "pad_token_id": 0}
    return model.generate(ids, past_key_values=cache, **options, **given).tolist()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_next", "gemma3"])
def test_greedy_tokens_are_the_unpatched_models(
    family: str, mode: Callable[[], Any], npu: torch.device, simulated: None
) -> None:
    """Two samples, one padded at the left."""
    model = tiny(family).eval()
    ids = torch.randint(2, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    ids[1, :4], mask[1, :4] = 0, 0
    expected = greedy(model, ids, StaticCache(model.config, LENGTH), 24, attention_mask=mask)
    model = model.to(npu)
    ids, mask = ids.to(npu), mask.to(npu)
    with applied(model) as report, mode():
        cache = StaticCache(model.config, LENGTH)
        assert greedy(model, ids, cache, 24, attention_mask=mask) == expected
        cache.reset()  # what a captured step relies on: the same memory
        assert greedy(model, ids, cache, 24, attention_mask=mask) == expected
    outcome = of_cache(report)
    assert outcome.calls.ran and set(outcome.calls.fell_through) == {"before its first use", "more tokens than one"}


def test_a_token_takes_three_kernels_and_keeps_every_address(npu: torch.device, simulated: None) -> None:
    token = torch.randn(2, 3, 1, 16, device=npu)
    other = -token
    layer = cache_utils.StaticLayer(max_cache_len=8)
    with torch.no_grad(), applied():
        layer.update(token.expand(2, 3, 5, 16).contiguous(), token.expand(2, 3, 5, 16).contiguous())
        held = {name: getattr(layer, name).data_ptr() for name in ("keys", "values", "cumulative_length")}
        with simulator.count() as counted:
            keys, values = layer.update(key_states=token, value_states=other)
    assert counted.launches == 3 and counted.host_copies == 0, counted
    assert keys is layer.keys and values is layer.values and int(layer.cumulative_length) == 6
    assert torch.equal(keys[:, :, 5:6], token) and torch.equal(values[:, :, 5:6], other)
    assert not keys[:, :, 6:].any()
    assert held == {name: getattr(layer, name).data_ptr() for name in held}


def test_a_captured_token_goes_to_the_next_place_at_each_replay(npu: torch.device, simulated: None) -> None:
    token = torch.ones(1, 2, 1, 16, device=npu)
    layer = cache_utils.StaticLayer(max_cache_len=6)
    graph = torch.npu.NPUGraph()
    with torch.no_grad(), applied():
        layer.update(token, token)
        with torch.npu.graph(graph):
            layer.update(token, token)
        for number in (2, 3, 4):
            token.fill_(number)
            graph.replay()
    assert layer.keys[0, 0, :, 0].tolist() == [1, 2, 3, 4, 0, 0] and int(layer.cumulative_length) == 4


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda layer, token: (token.requires_grad_(), token), "gradients"),
        (lambda layer, token: (token.bfloat16(), token.bfloat16()), "a token of torch.bfloat16"),
        (lambda layer, token: (torch.cat((token, token), 2),) * 2, "more tokens than one"),
    ],
    ids=["gradients", "dtype", "tokens"],
)
def test_other_calls_are_the_originals(
    change: Callable[[Any, Tensor], tuple[Tensor, Tensor]], reason: str, npu: torch.device
) -> None:
    token = torch.randn(1, 2, 1, 4, device=npu)
    found = []
    for patched in (False, True):
        with applied(patch=patched) as report:
            layer = cache_utils.StaticLayer(max_cache_len=6)
            with torch.no_grad():
                layer.update(token, token)
            try:
                keys, _ = layer.update(*change(layer, token.clone()))
                found.append(keys.detach().cpu().tolist())
            except RuntimeError as error:
                found.append(str(error))
    assert found[0] == found[1]
    assert any(each.startswith(reason) for each in of_cache(report).calls.fell_through)


def test_a_gradient_through_a_token_is_the_originals(npu: torch.device) -> None:
    found = []
    for patched in (False, True):
        model = tiny("qwen3").to(npu)
        with applied(model, patch=patched, fused_ops=False):
            cache = StaticCache(model.config, LENGTH)
            ids = torch.arange(3, 12, device=npu)[None]
            with torch.no_grad():
                model(input_ids=ids, past_key_values=cache)
            model(input_ids=ids[:, :1], past_key_values=cache).logits.square().sum().backward()
        found.append([parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Elsewhere(cache_utils.StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.cumulative_length.view(1) - 1, key_states)
        self.values.index_copy_(2, self.cumulative_length.view(1) - 1, value_states)
        self.cumulative_length.add_(1)
        return self.keys, self.values


class Counting(cache_utils.StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen = getattr(self, "seen", 0) + 1
        return super().update(key_states, value_states)


class Copied(cache_utils.StaticLayer):
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states)
        return keys.clone(), values


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Elsewhere, "does not write a token where its count says"),
        (Counting, "keeps more than"),
        (Copied, "does not return its keys"),
        (cache_utils.StaticSlidingWindowLayer, "cannot be observed"),
    ],
)
def test_another_cache_is_not_taken_for_one(cls: type, reason: str) -> None:
    found = read(cls, vars(cls)["update"])
    assert isinstance(found, NotRead) and reason in found.reason


def test_the_installed_cache_is_observed_and_put_back() -> None:
    original = vars(cache_utils.StaticLayer)["update"]
    assert read(cache_utils.StaticLayer, original) is WRITTEN
    with applied() as report:
        assert of_cache(report).status == "patched" and vars(cache_utils.StaticLayer)["update"] is not original
        copy.deepcopy(cache_utils.StaticLayer(max_cache_len=3))
    assert vars(cache_utils.StaticLayer)["update"] is original
    with applied(inference=False) as report:
        assert not [each for each in report if each.patch == "static_cache"]
    restore()
