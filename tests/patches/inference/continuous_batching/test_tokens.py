"""Continuous batching on the NPU gives the tokens of `generate()`, whatever way a step takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import simulator
from tests.support.continuous_batches import (
    NEAR,
    NEW,
    PROMPTS,
    apart,
    batched,
    calls_of,
    config,
    generated,
    generation,
    half,
    joining_later,
)

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
from transformers import CompileConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

ATTENDING = "of a paged cache"
NEAR_OF = {torch.float32: 0.0, torch.float16: NEAR, torch.bfloat16: 8 * NEAR}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("graphs", [None, False])
@pytest.mark.parametrize("asynchronous", [None, False])
@pytest.mark.parametrize("name", ["qwen3", "llama", "qwen3_moe"])
def test_by_pages(
    name: str, graphs: bool | None, asynchronous: bool | None, dtype: torch.dtype, npu: torch.device
) -> None:
    model = half(name, dtype)
    expected = generated(model)
    report = npu_patch.apply(model.to(npu))
    with simulator.count() as counted:
        found = batched(model, use_cuda_graph=graphs, use_async_batching=asynchronous)
    assert apart(found, expected, model.cpu().float(), NEAR_OF[dtype]) == []
    calls = calls_of(report, ATTENDING)
    assert calls.ran > 0 and not calls.fell_through
    assert (counted.replays >= NEW) == (graphs is None)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("graphs", [True, None])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gemma3", "mistral"])
def test_in_float32_whatever_the_attention(name: str, graphs: bool | None, attention: str, npu: torch.device) -> None:
    model = half(name, torch.float32)
    expected = generated(model)
    model.to(npu).set_attn_implementation(attention)
    npu_patch.apply(model)
    with simulator.count() as counted:
        assert batched(model, use_cuda_graph=graphs) == expected
    assert (counted.replays > 0) == (graphs is True and attention != "flash_attention_2")


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("name", ["gemma3", "mistral"])
def test_windows_are_packed_sequences(name: str, attention: str, npu: torch.device) -> None:
    """Prompts are longer than the window; transformers' flash attention on this device would not know of it."""
    model = half(name)
    expected = generated(model)
    model.to(npu).set_attn_implementation(attention)
    report = npu_patch.apply(model)
    assert apart(batched(model), expected, model.cpu().float()) == []
    assert (
        "sliding_attention has no tables of pages"
        in calls_of(report, "ensure_decode_fast_path_is_available").fell_through
    )
    calls = calls_of(report, ATTENDING)
    assert calls.ran > 0 and not calls.fell_through


def test_sinks_stay_with_the_attention_that_the_model_has(npu: torch.device) -> None:
    model = half("gpt_oss", torch.float32)
    model.set_attn_implementation("eager")
    expected = generated(model)
    npu_patch.apply(model.to(npu))
    assert batched(model) == expected


@pytest.mark.parametrize("size, words", [(8, "pages of 8 tokens"), (1024, "pages of 1024 tokens")])
def test_pages_that_the_operator_does_not_take(size: int, words: str, npu: torch.device) -> None:
    model = half("qwen3")
    expected = generated(model)
    report = npu_patch.apply(model.to(npu))
    assert apart(batched(model, page_size=size), expected, model.cpu().float()) == []
    (reason,) = calls_of(report, "ensure_decode_fast_path_is_available").fell_through
    assert words in reason


@pytest.mark.parametrize(
    "overrides, options, words",
    [
        ({"head_dim": 24}, {}, "heads of 24"),
        ({}, {"num_blocks": 4, "max_blocks_per_request": 64}, "a small cache: 256 pages may be shared"),
    ],
)
@pytest.mark.parametrize("graphs", [None, True])
def test_a_cache_that_the_operator_does_not_take(
    overrides: dict[str, Any], options: dict[str, Any], words: str, graphs: bool | None, npu: torch.device
) -> None:
    model = half("qwen3", **overrides)
    expected = generated(model)
    report = npu_patch.apply(model.to(npu))
    with simulator.count() as counted:
        found = batched(model, use_cuda_graph=graphs, **options)
    assert apart(found, expected, model.cpu().float()) == []
    (reason,) = calls_of(report, "PagedAttentionCache.__init__").fell_through
    assert words in reason and counted.replays == 0


def test_requests_that_join_later_and_stop_early(npu: torch.device) -> None:
    model = half("qwen3")
    expected = generated(model)
    npu_patch.apply(model.to(npu))
    with joining_later(model, PROMPTS) as found:
        assert apart(found, expected, model.float().cpu()) == []


def test_a_token_that_ends_a_sequence_ends_it(npu: torch.device) -> None:
    model = half("qwen3")
    eos = generated(model)[2][4]
    expected = generated(model, eos=eos)
    assert min(map(len, expected)) < NEW
    npu_patch.apply(model.to(npu))
    assert apart(batched(model, eos=eos), expected, model.cpu().float()) == []


@pytest.mark.parametrize("sharing", [True, False])
def test_a_group_shares_its_prompt(sharing: bool, npu: torch.device) -> None:
    """Its prompt fills a page and a half: one page is shared, and one copied for each."""
    model = half("qwen3")
    prompts = [list(range(20, 44)), [5, 6, 7]]
    expected = generated(model, prompts)
    npu_patch.apply(model.to(npu))
    found = model.generate_batch(
        inputs=prompts,
        generation_config=generation(num_return_sequences=3, do_sample=True, top_k=1),
        continuous_batching_config=config(allow_block_sharing=sharing),
    )
    found_of: list[list[list[int]]] = [[], []]
    assert len(found) == 6
    for index, each in enumerate(found.values()):
        found_of[index // 3].append(each.generated_tokens)
    model.cpu().float()
    for group, prompt, wanted in zip(found_of, prompts, expected, strict=True):
        assert apart(group, [wanted] * 3, model, prompts=[prompt] * 3) == []


def test_prompts_that_begin_alike_share_pages(npu: torch.device) -> None:
    model = half("qwen3")
    prompts = [list(range(20, 60)), [*range(20, 55), 3, 4], [*range(20, 38), 9]]
    expected = generated(model, prompts)
    npu_patch.apply(model.to(npu))
    found = batched(model, prompts, max_requests_per_batch=1)  # one after the other
    assert apart(found, expected, model.cpu().float(), prompts=prompts) == []


@pytest.mark.parametrize("merged", [False, True])
def test_with_adapters(merged: bool, npu: torch.device) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(half("qwen3"), peft.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    model.to(torch.float16).eval()
    if merged:
        model.merge_adapter()
    expected = generated(model)
    npu_patch.apply(model.to(npu))
    with simulator.count() as counted:
        found = batched(model)
    assert counted.replays >= NEW
    assert apart(found, expected, model.cpu().float()) == []
    with model.disable_adapter():
        assert generated(model.half().to(npu)) != found


@pytest.mark.parametrize("name", ["qwen3_next"])
def test_linear_attention_has_no_continuous_batching(name: str, npu: torch.device) -> None:
    model = half(name, torch.float32)
    npu_patch.apply(model.to(npu))
    with pytest.raises(ValueError, match="Invalid layer type: linear_attention"):
        batched(model)


def test_the_host_waits_once_a_step_however_many_layers_there_are(npu: torch.device) -> None:
    copies = []
    for layers in (2, 4):
        model = half("qwen3", num_hidden_layers=layers)
        with npu_patch.applied(model.to(npu)), simulator.count() as counted:
            batched(model, use_cuda_graph=False, use_async_batching=False)
        copies.append(counted.host_copies)
    assert copies[0] == copies[1] <= 3 * NEW


def test_a_step_of_single_tokens_is_one_replay(npu: torch.device) -> None:
    model = half("qwen3")
    npu_patch.apply(model.to(npu))
    launches = {}
    for new in (8, 24):
        batched(model, new=new)  # captures
        with simulator.count() as counted:
            batched(model, new=new)
        launches[new] = counted.launches, counted.replays
    more = launches[24][0] - launches[8][0]
    replays = launches[24][1] - launches[8][1]
    assert replays >= 16 and more / replays < 10  # what is prepared on the host comes in a few copies


def test_what_cannot_be_captured_runs_eagerly(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half("qwen3")
    expected = generated(model)
    report = npu_patch.apply(model.to(npu))
    forward = type(model.model.norm).forward

    def reading(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        assert hidden.sum().item() is not None
        return forward(self, hidden)

    monkeypatch.setattr(type(model.model.norm), "forward", reading)
    found = batched(model)
    monkeypatch.undo()
    assert apart(found, expected, model.cpu().float()) == []
    (reason,) = calls_of(report, "_capture_graph").fell_through
    assert reason.startswith("not captured: ")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_as_unpatched_where_the_switch_is_off(dtype: torch.dtype, npu: torch.device) -> None:
    model = half("qwen3", dtype)
    report = npu_patch.apply(model.to(npu), continuous_batching=False)
    assert not [each for each in report if each.patch == "generate_batch"]
    with simulator.count() as counted:
        batched(model)
    assert counted.replays == 0


def test_steps_that_are_compiled_take_no_tables_of_pages(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    model.set_attn_implementation("flash_attention_2")
    report = npu_patch.apply(model)
    for options in ({"default_compile_level": 1}, {"decode_compile_config": CompileConfig()}):
        ContinuousBatchingManager(model, generation(), config(**options))
    assert calls_of(report, "ensure_decode_fast_path_is_available").fell_through == {"steps are compiled": 2}


def test_sampling_is_seeded_and_draws_anew_at_each_replay(npu: torch.device) -> None:
    model = half("qwen3")
    npu_patch.apply(model.to(npu))

    def drawn(seed: int) -> list[list[int]]:
        found = model.generate_batch(
            inputs=list(PROMPTS[:2]),
            generation_config=generation(16, do_sample=True, temperature=1.5, top_k=50),
            continuous_batching_config=config(seed=seed),
        )
        return [each.generated_tokens for each in found.values()]

    first, second, other = drawn(1), drawn(1), drawn(2)
    assert first == second != other
    assert len(set(first[0])) > 4
