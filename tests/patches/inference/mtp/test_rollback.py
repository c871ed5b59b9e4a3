"""Caches of linear attention that take tokens back: the state gone back to, what is refused, and what is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, cache_utils

import npu_patch
from npu_patch import applied, apply, restore
from npu_patch.ops.gated_delta import recorded
from npu_patch.patches.inference.mtp import patch
from tests.support.heads import FAMILIES, GREEDY, prompt
from tests.support.tiny_models import tiny

LINEAR = 0  # the layer with a recurrent state


def recording(model: Any, ids: Tensor) -> DynamicCache:
    """A cache that records, after a prompt."""
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    fed(model, cache, ids)
    cache.crop(0)
    return cache


def fed(model: Any, cache: DynamicCache, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def states_of(cache: DynamicCache) -> list[Tensor]:
    layer = cache.layers[LINEAR]
    return [layer.conv_states[0], layer.recurrent_states[0]]


@pytest.mark.parametrize("rejected", [0, 1, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_after_a_crop_the_states_are_those_of_the_accepted_tokens(family: str, rejected: int) -> None:
    """To the rounding of products over other numbers of rows; bit by bit, whatever was rejected."""
    model, ids = tiny(family), prompt(20)
    accepted, others = ids[:, 9 : 14 - rejected], prompt(rejected, seed=7)
    with applied(model, device="cpu", mtp=True):
        drafted, otherwise, alone = (recording(model, ids[:, :9]) for _ in range(3))
        for cache, draft in ((drafted, ids[:, 9:14]), (otherwise, torch.cat((accepted, others), 1))):
            fed(model, cache, draft)
            cache.crop(-rejected)
        if accepted.numel():
            fed(model, alone, accepted)
            alone.crop(0)
        for one, other, third in zip(*map(states_of, (drafted, otherwise, alone)), strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, third, rtol=1e-5, atol=1e-6)
        assert drafted.get_seq_length() == alone.get_seq_length() == 14 - rejected
        after = [fed(model, cache, ids[:, 14:16]) for cache in (drafted, otherwise, alone)]
    for other in after[1:]:
        torch.testing.assert_close(after[0], other, rtol=1e-4, atol=1e-5)


def test_drafts_over_several_forwards_are_taken_back_at_once() -> None:
    """As an assistant's are, which drafts token by token."""
    model, ids = tiny("qwen3_next"), prompt(20)
    with applied(model, device="cpu", mtp=True):
        cache, other = recording(model, ids[:, :9]), recording(model, ids[:, :9])
        for at in range(9, 14):
            fed(model, cache, ids[:, at : at + 1])
        cache.crop(-3)
        for at in range(9, 11):
            fed(model, other, ids[:, at : at + 1])
        other.crop(0)
        assert all(torch.equal(*pair) for pair in zip(states_of(cache), states_of(other), strict=True))


def test_a_crop_computes_nothing_of_the_model_again() -> None:
    model, ids = tiny("qwen3_next"), prompt(20)
    with applied(model, device="cpu", mtp=True):
        cache = recording(model, ids[:, :9])
        fed(model, cache, ids[:, 9:14])
        model.forward = model.model.forward = None
        cache.crop(-2)
    assert cache.get_seq_length() == 12


def test_a_token_of_the_prompt_cannot_be_taken_back_and_nothing_is_changed() -> None:
    model, ids = tiny("qwen3_next"), prompt(20)
    with applied(model, device="cpu", mtp=True):
        cache = recording(model, ids[:, :9])
        fed(model, cache, ids[:, 9:12])
        before = [each.clone() for each in states_of(cache)]
        with pytest.raises(RuntimeError, match=r"4 tokens cannot be taken back .* after the last 3 were kept"):
            cache.crop(-4)
        assert all(torch.equal(*pair) for pair in zip(before, states_of(cache), strict=True))
        cache.crop(-3)
        assert cache.is_croppable


@pytest.mark.parametrize("how", ["positive", "before the first token", "copied"])
def test_other_crops(how: str) -> None:
    model, ids = tiny("qwen3_next"), prompt(20)
    with applied(model, device="cpu", mtp=True):
        if how == "before the first token":
            cache = DynamicCache(config=model.config)
            cache.activate_past_recording()
            assert not cache.layers[LINEAR].is_croppable
            cache.crop(-1)
        elif how == "positive":
            with pytest.raises(RuntimeError, match="negative int"):
                recording(model, ids[:, :9]).crop(1)
        else:
            cache = copy.deepcopy(recording(model, ids[:, :9]))
            cache.activate_past_recording()
            for at in (9, 11):
                fed(model, cache, ids[:, at : at + 2])
            cache.crop(-2)
            assert cache.get_seq_length() == 11


def test_generation_leaves_a_cache_that_records_no_longer() -> None:
    """Or each token of whoever goes on with it would keep a state."""
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt()
    with applied(model, device="cpu", mtp=True):
        out = model.generate(ids, max_new_tokens=8, prompt_lookup_num_tokens=2, return_dict_in_generate=True, **GREEDY)
        cache = out.past_key_values
        layer = cache.layers[LINEAR]
        assert layer not in recorded.RECORDINGS and not layer.record_past
        assert recorded.recording_of(layer.recurrent_states[0]) is None  # its next prompt runs over chunks
        options = {"max_new_tokens": 24, **GREEDY}
        went_on = model.generate(out.sequences, past_key_values=cache, **options)
        assert cache.layers[LINEAR].conv_states[0].shape[-1] == 4
    assert torch.equal(went_on, model.generate(out.sequences, **options))


def test_generation_that_ends_in_an_error_leaves_nothing_recorded() -> None:
    class Stop(Exception):
        pass

    def stop(*args: Any) -> bool:
        raise Stop

    model = tiny("qwen3_next")
    cache = DynamicCache(config=model.config)
    with applied(model, device="cpu", mtp=True), pytest.raises(Stop):
        given = {"past_key_values": cache, "stopping_criteria": [stop], "prompt_lookup_num_tokens": 2}
        model.generate(prompt(), max_new_tokens=8, **given, **GREEDY)
    assert cache.layers[LINEAR].conv_states[0] is not None
    assert cache.layers[LINEAR] not in recorded.RECORDINGS


def test_a_state_that_no_rule_made_is_the_originals() -> None:
    """mamba's, say, of a cache that somebody crops: its convolution is cut back, its recurrent state is not."""
    found = []
    for patched in (False, True):
        with applied(device="cpu", patch=patched, mtp=True):
            layer = cache_utils.LinearAttentionLayer()
            layer.activate_past_recording()
            for number in (1.0, 2.0):
                layer.update_conv_state(torch.full((1, 3, 6), number), conv_kernel_size=4)
                layer.update_recurrent_state(torch.full((1, 2, 3), number))
            layer.crop(-1)
            found.append([layer.conv_states[0], layer.recurrent_states[0]])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_rule_that_is_passed_by_in_a_call_is_an_error_and_no_wrong_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where layers are compiled: then nothing is recorded, and what was drafted must not stay in the state."""
    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match="cannot be taken back from a recurrent state"):
            model.generate(prompt().repeat(1, 3), max_new_tokens=24, prompt_lookup_num_tokens=3, **GREEDY)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_drafts_are_taken_back_in_other_modes_of_torch(mode: Any) -> None:
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt().repeat(1, 3)
    with applied(model, device="cpu", mtp=True), mode():
        cache, other = (recording(model, ids[:, :9]) for _ in range(2))
        for each, draft in ((cache, ids[:, 9:14]), (other, torch.cat((ids[:, 9:11], prompt(3, seed=7)), 1))):
            fed(model, each, draft)
            each.crop(-3)
        assert all(torch.equal(*pair) for pair in zip(states_of(cache), states_of(other), strict=True))


@pytest.mark.parametrize("order", ["before", "twice", "added"])
def test_the_order_of_apply_does_not_matter(order: str) -> None:
    if order == "before":
        apply(device="cpu", mtp=True)
    model, ids = tiny("qwen3_5", max_position_embeddings=512), prompt().repeat(1, 3)
    if order == "added":
        apply(model, device="cpu")
        assert model._is_stateful
    for _ in range(2 if order == "twice" else 1 if order == "added" else 0):
        apply(model, device="cpu", mtp=True)
    found = model.generate(ids, max_new_tokens=24, prompt_lookup_num_tokens=3, **GREEDY)
    restore()
    assert torch.equal(found, model.generate(ids, max_new_tokens=24, **GREEDY))


def test_caches_without_states_are_the_originals() -> None:
    config = LlamaConfig(num_hidden_layers=1)
    with applied(device="cpu", mtp=True):
        cache = DynamicCache(config=config)
        cache.activate_past_recording()
        cache.update(torch.ones(1, 2, 5, 4), torch.ones(1, 2, 5, 4), 0)
        cache.crop(-2)
        assert cache.get_seq_length() == 3 and cache.is_croppable


@pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 2}, {"use_mtp": True}, {"assistant_model": "another"}])
def test_without_the_switch_and_after_restore_a_stateful_model_is_refused(how: dict[str, Any]) -> None:
    model = tiny("qwen3_next")
    given = {name: tiny("qwen3") if name == "assistant_model" else value for name, value in how.items()}
    refused = pytest.raises(ValueError, match="not supported with stateful models, such as Qwen3NextForCausalLM")
    with applied(model, device="cpu"), refused:
        model.generate(prompt(), max_new_tokens=2, **given, **GREEDY)
    assert type(model)._is_stateful is True
    apply(model, device="cpu", mtp=True)
    assert type(model)._is_stateful is True and model._is_stateful is False
    restore()
    with refused:
        model.generate(prompt(), max_new_tokens=2, **given, **GREEDY)
    assert model._is_stateful is True


def test_the_report_is_silent_about_what_nobody_asked_for() -> None:
    assert not [note for note in npu_patch.apply(tiny("qwen3"), device="cpu").notes if note.startswith("mtp")]
    assert "mtp: switched off by apply(mtp=False)" in npu_patch.apply(tiny("qwen3"), device="cpu", mtp=False).notes


def test_a_transformers_that_lacks_one_thing_keeps_all_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of it would take wrong tokens for right ones."""
    monkeypatch.setitem(patch.DOORS, patch.LAYERS, (patch.Door("Absent", "from_pretrained"),))
    model, crop = tiny("qwen3_next"), cache_utils.LinearAttentionCacheLayerMixin.crop
    with applied(model, device="cpu", mtp=True) as report:
        assert model._is_stateful is True and cache_utils.LinearAttentionCacheLayerMixin.crop is crop
    (found,) = (each for each in report if each.patch == "mtp")
    assert (found.site, found.status) == ("transformers.modeling_layers.Absent.from_pretrained", "skipped")
    assert "5.23 does" in found.reason and not [each for each in report.warnings if "mtp" in each]


def test_a_model_stays_stateful_while_one_thing_is_not_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True) as report:
        assert model._is_stateful is False
        monkeypatch.delitem(patch._BOUND, ("LinearAttentionCacheLayerMixin", "crop"))
        assert model._is_stateful is True
    reasons = {reason for each in report if each.patch == "mtp" for reason in each.calls.fell_through}
    assert reasons == {"LinearAttentionCacheLayerMixin.crop is not in place"}


def test_a_stateful_model_of_another_kind_stays_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=101, hidden_size=16, num_hidden_layers=1, state_size=4)).eval()
    refused_by = pytest.raises(ValueError, match="not supported with stateful models, such as MambaForCausalLM")
    with applied(model, device="cpu", mtp=True) as report, refused_by:
        model.generate(prompt(), max_new_tokens=2, prompt_lookup_num_tokens=2, **GREEDY)
    reasons = {reason for each in report if each.patch == "mtp" for reason in each.calls.fell_through}
    assert reasons == {"MambaMixer has a recurrent state that nothing of npu_patch records"}


def test_a_rule_that_is_not_served_keeps_the_model_stateful() -> None:
    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True, fla=False) as report:
        assert model._is_stateful is True
    reasons = {reason for each in report if each.patch == "mtp" for reason in each.calls.fell_through}
    assert reasons == {"Qwen3NextGatedDeltaNet has a recurrent state that nothing of npu_patch records"}


@pytest.mark.parametrize("batch", [2])
def test_several_samples_are_refused_by_transformers(batch: int) -> None:
    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True), pytest.raises(ValueError, match="only supported for batch_size = 1"):
        model.generate(prompt().repeat(batch, 1), max_new_tokens=2, prompt_lookup_num_tokens=2, **GREEDY)


def test_a_static_cache_is_refused_by_transformers() -> None:
    model = tiny("qwen3_next")
    with applied(model, device="cpu", mtp=True), pytest.raises(ValueError, match="not supported with Static cache"):
        given = {"cache_implementation": "static", "prompt_lookup_num_tokens": 2}
        model.generate(prompt(), max_new_tokens=2, **given, **GREEDY)
