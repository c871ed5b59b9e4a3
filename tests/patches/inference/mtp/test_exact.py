"""Greedy tokens with drafts are those without, whatever the drafts are; in float32, over 256 tokens."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch import applied
from tests.support.drafts import DRAFTS, drafting
from tests.support.heads import FAMILIES, GREEDY, loaded, prompt, saved
from tests.support.tiny_models import tiny

TOKENS, FEWER = 256, 64


@functools.cache
def plainly(family: str) -> tuple[Any, Tensor]:
    """A model, and what it says without drafts."""
    model = tiny(family, max_position_embeddings=512)
    return model, model.generate(prompt(), max_new_tokens=TOKENS, **GREEDY)


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_plain_decoding_whatever_is_drafted(
    family: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = plainly(family)
    lengths = drafting(monkeypatch, plain, DRAFTS[kind])
    with applied(model, device="cpu", mtp=True):
        found = model.generate(prompt(), max_new_tokens=TOKENS, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found, plain)
    if kind == "longer than the rest":
        assert max(lengths) >= 38 and len(lengths) < 12
    steps = {"always wrong": TOKENS, "all right": TOKENS // 6 + 2}.get(kind)
    assert steps is None or abs(len(lengths) - steps) <= 2, lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_with_prompt_lookup_are_those_of_plain_decoding(family: str) -> None:
    model, ids = tiny(family, max_position_embeddings=512), prompt().repeat(1, 3)
    plain = model.generate(ids, max_new_tokens=FEWER, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        assert torch.equal(
            model.generate(ids, max_new_tokens=FEWER, prompt_lookup_num_tokens=4, max_matching_ngram_size=1, **GREEDY),
            plain,
        )


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("assistant", ["its own", "another", "qwen3"])
def test_tokens_with_an_assistant_model_are_those_of_plain_decoding(assistant: str, tokens: int) -> None:
    """One that is stateful itself: it never drafts what is taken, or always; and one that is not."""
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt(tokens)
    plain = model.generate(ids, max_new_tokens=FEWER, **GREEDY)
    if assistant == "its own":
        other = model
    else:
        other = tiny("qwen3_5" if assistant == "another" else assistant, max_position_embeddings=512, seed=3)
    other.generation_config.num_assistant_tokens, other.generation_config.assistant_confidence_threshold = 4, 0.0
    forwards: list[int] = []
    with applied(model, device="cpu", mtp=True), applied(other, device="cpu", mtp=True):
        model.lm_head.register_forward_hook(lambda module, args, output: forwards.append(output.shape[1]))
        assert torch.equal(model.generate(ids, max_new_tokens=FEWER, assistant_model=other, **GREEDY), plain)
    checks = [each for each in forwards if each > 1]
    assert len(checks) < FEWER / 4 if assistant == "its own" else len(checks) > FEWER / 2


def test_an_assistant_that_is_stateful_needs_a_prompt_of_two_tokens() -> None:
    model = tiny("qwen3_next")
    with applied(device="cpu", mtp=True), pytest.raises(ValueError, match="a prompt of two tokens or more"):
        model.generate(prompt(1), max_new_tokens=4, assistant_model=tiny("qwen3_5"), **GREEDY)


@pytest.mark.parametrize("how", [{}, {"cache_implementation": "static"}])
def test_a_model_on_another_device_is_refused_as_ever(how: dict[str, Any], npu: torch.device) -> None:
    model = tiny("qwen3_next")
    with applied(model, mtp=True) as report, pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(prompt(), max_new_tokens=8, prompt_lookup_num_tokens=3, **how, **GREEDY)
    (stateful,) = (each for each in report if each.site.endswith("_is_stateful") and each.calls.fell_through)
    assert list(stateful.calls.fell_through) == ["Qwen3NextGatedDeltaNet is on cpu: states are recorded on npu"]


@pytest.mark.parametrize("tokens", [1, 2, 4])
def test_a_head_drafts_no_more_tokens_than_the_prompt_has(tokens: int, tmp_path: Path) -> None:
    """Drafts that were wrong are made anew from where they began, and transformers does not look where that is."""
    model, ids = loaded(saved("qwen3_5", tmp_path)), prompt(tokens)
    plain = model.generate(ids, max_new_tokens=24, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        given = {"max_new_tokens": 24, "use_mtp": True, "num_assistant_tokens": 5}
        assert torch.equal(model.generate(ids, **given, **GREEDY), plain)


def test_threads_may_draft_different_numbers_of_tokens(tmp_path: Path) -> None:
    model = loaded(saved("qwen3_5", tmp_path))
    plain = model.generate(prompt(), max_new_tokens=24, **GREEDY)
    with applied(model, device="cpu", mtp=True), ThreadPoolExecutor(2) as pool:

        def drafted(number: int) -> Tensor:
            given = {"max_new_tokens": 24, "use_mtp": True, "num_assistant_tokens": number}
            found: Tensor = model.generate(prompt(), **given, **GREEDY)
            return found

        assert all(torch.equal(found, plain) for found in pool.map(drafted, (1, 4, 2, 3, 1, 4)))


def test_a_stateful_assistant_serves_a_model_without_states() -> None:
    model, ids = tiny("qwen3", max_position_embeddings=512), prompt()
    assistant = tiny("qwen3_next", max_position_embeddings=512)
    plain = model.generate(ids, max_new_tokens=64, **GREEDY)
    with applied(model, device="cpu", mtp=True), applied(assistant, device="cpu", mtp=True):
        own = assistant.generate(ids, max_new_tokens=64, **GREEDY)
        assert torch.equal(model.generate(ids, max_new_tokens=64, assistant_model=assistant, **GREEDY), plain)
        assert torch.equal(assistant.generate(ids, max_new_tokens=64, assistant_model=model, **GREEDY), own)


def test_an_assistant_that_nothing_was_applied_to_is_as_it_was() -> None:
    """Its drafts are what transformers makes of states that nobody took back; the tokens are the model's."""
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=32, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        assistant = tiny("qwen3_5", max_position_embeddings=512)
        assert torch.equal(model.generate(ids, max_new_tokens=32, assistant_model=assistant, **GREEDY), plain)


@pytest.mark.parametrize(
    "options", [{"eos_token_id": 37}, {"repetition_penalty": 1.3}, {"return_dict_in_generate": True}]
)
def test_what_ends_or_changes_a_generation_does_so_at_the_same_token(options: dict[str, Any]) -> None:
    model, ids = tiny("qwen3_5", max_position_embeddings=512), prompt()
    plain = model.generate(ids, max_new_tokens=64, **GREEDY, **options)
    with applied(model, device="cpu", mtp=True):
        found = model.generate(ids, max_new_tokens=64, prompt_lookup_num_tokens=3, **GREEDY, **options)
    if options.get("return_dict_in_generate"):
        plain, found = plain.sequences, found.sequences
    assert torch.equal(found, plain)


def test_padding_before_the_prompt_changes_nothing() -> None:
    model, ids = tiny("qwen3_next", max_position_embeddings=512), prompt()
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = (torch.arange(13) >= 4).long()[None]
    plain = model.generate(padded, attention_mask=mask, max_new_tokens=64, **GREEDY)
    with applied(model, device="cpu", mtp=True):
        found = model.generate(padded, attention_mask=mask, max_new_tokens=64, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found, plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_on_the_npu_are_those_of_plain_decoding(family: str, npu: torch.device) -> None:
    model, ids = tiny(family, max_position_embeddings=512), prompt().repeat(1, 2)
    plain = model.generate(ids, max_new_tokens=48, **GREEDY)
    model = model.to(npu)
    with applied(model, mtp=True) as report:
        found = model.generate(ids.to(npu), max_new_tokens=48, prompt_lookup_num_tokens=3, **GREEDY)
    assert torch.equal(found.cpu(), plain)
    (crop,) = (each for each in report if each.site.endswith("LinearAttentionCacheLayerMixin.crop"))
    assert crop.calls.ran and not crop.calls.fell_through


def test_in_bfloat16_the_recurrent_operator_checks_a_draft_in_one_call_a_layer(
    npu: torch.device, simulated: None
) -> None:
    model, ids = tiny("qwen3_next", max_position_embeddings=512).bfloat16().to(npu), prompt().repeat(1, 2).to(npu)
    given = {"max_new_tokens": 24, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1, **GREEDY}
    with applied(model, mtp=True, recurrent_bf16=True) as report:
        model.generate(ids, **given)
    ran = {name for each in report for name in each.calls.ran_by}
    assert "torch_npu.npu_recurrent_gated_delta_rule" in ran
    (crop,) = (each for each in report if each.site.endswith("LinearAttentionCacheLayerMixin.crop"))
    assert crop.calls.ran and not crop.calls.fell_through
