"""generate() over a static cache: the tokens of the unpatched model, one launch for each of its steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

import npu_patch
from npu_patch import simulator
from tests.support.generating import COMPARED, STATIC, calls_of, prompt, reasons, tokens
from tests.support.tiny_models import tiny

ALONE = {switch: False for switch in ("fused_ops", "moe_patch", "fla", "lora", "loss", "vision")}
FAMILIES = (
    "qwen3",
    "qwen3_moe",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_next",
    "llama",
    "glm4_moe",
    "gemma3",
    "mistral",
    "gpt_oss",
)

LONG = ("qwen3", "qwen3_moe", "qwen3_5", "qwen3_next", "gemma3")


def on(npu: torch.device, family: str = "qwen3", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    return tiny(family, max_position_embeddings=1024, **overrides).to(npu, dtype)


@pytest.mark.parametrize("switches", [{}, ALONE], ids=["all patches", "alone"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_a_family_are_those_of_the_unpatched_model(
    npu: torch.device, family: str, switches: dict[str, Any]
) -> None:
    count = 256 if not switches and family in LONG else 40
    windows = {"sliding_window": 40} if family in ("gemma3", "mistral", "gpt_oss") else {}
    expected = tokens(tiny(family, max_position_embeddings=1024, **windows), count)
    assert len(set(expected[1].tolist())) > 8
    model = on(npu, family, **windows)
    npu_patch.apply(model, **switches)
    assert torch.equal(tokens(model, count, **STATIC), expected)
    assert calls_of().ran == count - 1 - COMPARED and not reasons()
    assert torch.equal(tokens(model, count, **STATIC), expected)
    assert calls_of().ran == 2 * (count - 1) - COMPARED and not reasons()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3_5", "gemma3"])
def test_logits_in_bfloat16_are_those_of_the_steps_it_replaces(npu: torch.device, family: str) -> None:
    model = on(npu, family, torch.bfloat16)
    found = []
    for captured in (False, True):
        with npu_patch.applied(model, captured_decode=captured):
            cache = StaticCache(config=model.config, max_cache_len=64)
            if family == "gemma3":  # of a caller's own cache, windows are not captured
                found.append(tokens(model, 24, **STATIC))
                continue
            given = {name: each.to(npu) for name, each in prompt().items()}
            how = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "output_logits": True}
            result = model.generate(**given, **how, past_key_values=cache, return_dict_in_generate=True)
            found.append(torch.stack(result.logits).cpu())
            assert not captured or calls_of().ran == 23 - COMPARED
    assert torch.equal(*found)


def test_a_step_is_one_launch_beside_those_of_the_loop(npu: torch.device, simulated: None) -> None:
    model = on(npu, num_hidden_layers=6)
    npu_patch.apply(model)
    tokens(model, 12, repetition_penalty=1.0, **STATIC)
    short, long = (counted(model, count) for count in (12, 32))
    steps = 20
    assert long.replays - short.replays == steps
    # The token to its place, its logits in float32, and argmax, cat, and the two stopping criteria of generate().
    assert (long.launches - short.launches) / steps <= 14
    assert (long.host_copies - short.host_copies) / steps == 1  # generate() asks whether all is finished
    assert long.uploads == short.uploads
    model.generation_config.eos_token_id = None


def counted(model: Any, count: int) -> Any:
    with simulator.count() as found:
        tokens(model, count, repetition_penalty=1.0, **STATIC)
    return found


@pytest.mark.parametrize("length", [5, 20, 30])
def test_another_length_of_the_bucket_replays_the_same_graph(npu: torch.device, length: int) -> None:
    model = on(npu)
    npu_patch.apply(model)
    tokens(model, 20, prompt(length=31), **STATIC)
    before = calls_of().ran
    batch = prompt(length=length, seed=length)
    assert torch.equal(tokens(model, 20, batch, **STATIC), tokens(model, 20, batch))
    assert calls_of().ran == before + 19


@pytest.mark.parametrize(
    "batch, count",
    [(prompt(batch=3), 8), (prompt(batch=1, padding=0), 8), (prompt(), 90)],
    ids=["more", "fewer", "longer"],
)
def test_another_batch_or_bucket_is_captured_anew(npu: torch.device, batch: dict[str, Any], count: int) -> None:
    model = on(npu)
    npu_patch.apply(model)
    first = tokens(model, **STATIC)
    before = calls_of().ran
    assert torch.equal(tokens(model, count, batch, **STATIC), tokens(model, count, batch))
    assert calls_of().ran == before + count - 1 - COMPARED
    assert torch.equal(tokens(model, **STATIC), first)


def test_padded_and_unpadded_prompts_in_turns(npu: torch.device) -> None:
    model = on(npu)
    npu_patch.apply(model)
    for _ in range(2):
        for batch in (prompt(padding=4), prompt(padding=0), prompt(padding=7, seed=3)):
            assert torch.equal(tokens(model, batch=batch, **STATIC), tokens(model, batch=batch))
    assert not [each for each in reasons() if "grows" not in each]
    assert calls_of().ran == 6 * 7 - 2 * COMPARED


@pytest.mark.parametrize("how", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"num_return_sequences": 3}])
def test_sampled_tokens_are_those_of_the_same_seed(npu: torch.device, how: dict[str, Any]) -> None:
    model = on(npu)
    how = {**how, "do_sample": True, "repetition_penalty": 1.0}
    found = []
    for captured in (False, True, True):
        npu_patch.apply(model, captured_decode=captured)
        torch.manual_seed(7)
        found.append((tokens(model, 12, **how, **STATIC), torch.rand(3, device=npu).cpu()))
    for other in found[1:]:
        assert torch.equal(other[0], found[0][0]) and torch.equal(other[1], found[0][1])
    assert calls_of().ran == 22 - COMPARED


def test_sequences_that_end_early_are_padded_and_end_the_loop(npu: torch.device) -> None:
    model = on(npu)
    expected = tokens(model, 30)
    ends = [int(expected[0, 5]), int(expected[1, 9])]
    how = {"eos_token_id": ends, "min_new_tokens": 0}
    unpatched = tokens(model, 30, **how)
    assert unpatched.shape[1] < 12
    npu_patch.apply(model)
    for _ in range(2):
        assert torch.equal(tokens(model, 30, **how, **STATIC), unpatched)
    assert calls_of().ran == 2 * (unpatched.shape[1] - 1) - COMPARED


def test_restore_leaves_transformers_and_the_model_as_they_were(npu: torch.device) -> None:
    from transformers.generation.utils import GenerationMixin

    model = on(npu)
    before = {name: vars(GenerationMixin)[name] for name in ("_sample", "_beam_search", "_assisted_decoding")}
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = set(vars(model))
    npu_patch.apply(model)
    expected = tokens(model, **STATIC)
    npu_patch.restore()
    assert all(vars(GenerationMixin)[name] is each for name, each in before.items())
    assert set(vars(model)) - state == {"_previous_max_cache_length"}  # which is transformers' own
    assert model._previous_max_cache_length == 9 + 8 - 1
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(tokens(model, **STATIC), expected)
