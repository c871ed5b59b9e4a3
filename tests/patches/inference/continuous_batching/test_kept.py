"""A manager is kept between calls that ask for the same, and nothing that it knew of other weights is used."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import simulator
from npu_patch.decoding.host_state import observe
from npu_patch.patches.inference.continuous_batching import kept
from tests.support.continuous_batches import apart, batched, calls_of, config, generated, generation, half, kept_calls

pytest.importorskip("transformers.generation.continuous_batching.cache_allocators")
LONG = [list(range(20, 60)), [*range(20, 55), 3, 4]]  # two pages of both are the same


def changed_in_place(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)


def changed_behind_the_version(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


def moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5


def another_parameter(model: Any) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, torch.nn.Parameter(parameter.detach() * 1.5))


@pytest.mark.parametrize("change", [changed_in_place, changed_behind_the_version, moved, another_parameter])
def test_changed_weights_are_seen_and_keys_of_before_are_not(change: Callable[[Any], None], npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    before = batched(model, LONG)
    change(model)
    found = batched(model, LONG)
    stays = change in (changed_in_place, changed_behind_the_version)
    assert kept_calls(report).ran_by == ({kept.MADE: 1, kept.KEPT: 1} if stays else {kept.MADE: 2})
    npu_patch.restore()
    assert apart(found, generated(model, LONG), model.cpu().float(), prompts=LONG) == []
    assert found != before


def test_the_second_call_captures_nothing_and_is_told_of_the_same_requests(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    found = batched(model)
    captured = calls_of(report, "_capture_graph").ran
    model.train()
    with simulator.count() as counted:
        assert batched(model) == found
    assert not model.training, "as a new manager leaves it"
    assert calls_of(report, "_capture_graph").ran == captured > 0 and counted.replays > 0
    assert not hasattr(model, kept.CACHED) and kept_calls(report).resting is not None


def with_another_scale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2.0


def with_a_hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, result: result * -1.0)


def with_another_config(model: Any) -> None:
    model.config.some_setting = 3


@pytest.mark.parametrize("change", [with_another_scale, with_a_hook, with_another_config])
def test_what_a_graph_cannot_see_makes_a_new_manager(change: Callable[[Any], None], npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    batched(model)
    change(model)
    found = batched(model)
    assert kept_calls(report).ran_by == {kept.MADE: 2}
    npu_patch.restore()
    assert apart(found, generated(model), model.cpu().float()) == []


@pytest.mark.parametrize(
    "first, second, new",
    [
        ({}, {}, False),
        ({"page_size": 32}, {"page_size": 16}, True),
        ({"return_logprobs": False}, {"return_logprobs": True}, True),
    ],
)
def test_another_configuration_makes_a_new_manager(
    first: dict[str, Any], second: dict[str, Any], new: bool, npu: torch.device
) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    for options in (first, second):
        batched(model, **options)
    assert kept_calls(report).ran_by == ({kept.MADE: 2} if new else {kept.MADE: 1, kept.KEPT: 1})


def test_longer_sequences_make_a_new_manager_and_shorter_ones_do_not(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    for prompts in ([[1, 2, 3]], [list(range(20, 90))], [[1, 2, 3, 4]]):
        batched(model, prompts)
    assert kept_calls(report).ran_by == {kept.MADE: 2, kept.KEPT: 1}


def test_adapters_that_are_trained_stay_and_those_that_are_switched_or_merged_do_not(npu: torch.device) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(half("qwen3"), lora)
    model.add_adapter("other", lora)
    model.to(torch.float16).to(npu)
    report = npu_patch.apply(model)
    calls = kept_calls(report)

    def trained() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(0.5)

    asked = []
    for change in (lambda: None, trained, lambda: model.set_adapter("other"), model.merge_adapter):
        change()
        found = batched(model)
        asked.append(calls.ran_by[kept.KEPT])
        reference = copy.deepcopy(model).cpu()
        assert apart(found, generated(reference), reference.float()) == []
    assert asked == [0, 1, 1, 1]


def test_it_goes_with_its_model(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    report = npu_patch.apply(model)
    batched(model)
    resting = kept_calls(report).resting
    assert resting is not None
    cache = weakref.ref(resting.manager.batch_processor.cache)
    gone = weakref.ref(model)
    del model, resting
    gc.collect()
    assert gone() is cache() is kept_calls(report).resting is None


def test_it_goes_with_the_patch(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    calls = kept_calls(npu_patch.apply(model))
    batched(model)
    assert calls.resting is not None
    cache = weakref.ref(calls.resting.manager.batch_processor.cache)
    npu_patch.restore()
    gc.collect()
    assert cache() is calls.resting is None
    held = torch.npu.memory_allocated()
    batched(model)
    gc.collect()
    assert torch.npu.memory_allocated() <= held


def test_another_model_has_its_own(npu: torch.device) -> None:
    one, other = half("qwen3").to(npu), half("llama").to(npu)
    calls = kept_calls(npu_patch.apply())
    found = [batched(one), batched(other), batched(one)]
    assert calls.ran_by == {kept.MADE: 3} and found[0] == found[2]


def test_one_that_takes_much_memory_is_let_go(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = half("qwen3").to(npu)
    calls = kept_calls(npu_patch.apply(model))
    monkeypatch.setattr(kept, "LARGEST_SHARE", 1e-9)
    batched(model)
    assert calls.resting is None and "of the memory" in calls.declined[kept.KEPT]


def test_callers_that_keep_their_own_go_on_doing_so(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    calls = kept_calls(npu_patch.apply(model))
    for _ in range(2):
        model.generate_batch(
            inputs=LONG, generation_config=generation(), continuous_batching_config=config(), persistent_manager=True
        )
    assert hasattr(model, kept.CACHED) and calls.resting is None
    assert calls.fell_through == {"the caller keeps a manager": 2}
    model.destroy_cached_continuous_batching_manager()


def test_an_error_in_the_session_keeps_nothing(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    calls = kept_calls(npu_patch.apply(model))
    with pytest.raises(KeyError, match="the caller's"):  # noqa: SIM117
        with model.continuous_batching_context_manager(
            generation_config=generation(), continuous_batching_config=config()
        ) as manager:
            manager.add_request(LONG[0], eos_token_id=-1)
            raise KeyError("the caller's")
    assert calls.resting is None and not hasattr(model, kept.CACHED) and not manager.is_running()
    assert model.config._attn_implementation == "sdpa"


def test_copies_and_pickles_of_a_model_know_nothing_of_it(npu: torch.device) -> None:
    model = half("qwen3").to(npu)
    npu_patch.apply(model)
    batched(model)
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model).cpu()))
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_training_leaves_what_is_looked_at_and_the_optimizer_what_it_does(npu: torch.device) -> None:
    model = half("qwen3", torch.float32).to(npu)
    before = observe(model, "npu", (kept.SET_BY_EACH_CALL,)).state
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(2, 90, (2, 9), device=npu)
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert observe(model, "npu", (kept.SET_BY_EACH_CALL,)).state == before
