"""What no graph may stand for runs as it did, and says why; and who owns the cache, the memory and the turn."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList, StaticCache

import npu_patch
from npu_patch.decoding import graph, kept
from tests.support.generating import COMPARED, STATIC, calls_of, prompt, reasons, tokens
from tests.support.lora_models import PRECISIONS, adapted_model
from tests.support.tiny_models import tiny

COUNT = 8
CAPTURED, REPLAYED = COUNT - 1 - COMPARED, COUNT - 1


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each attempt."""
    from npu_patch.decoding import step

    attempts: list[int] = []

    def counted(*args: Any) -> graph.Graph:
        attempts.append(1)
        return graph.captured(*args)

    monkeypatch.setattr(step, "captured", counted)
    return attempts


def reads_on_the_host(model: Any) -> None:
    _wrap(model, lambda module, hidden: hidden * (1 + 0 * hidden.sum().item()))


def counts_on_the_host(model: Any) -> None:
    model.model.layers[1].mlp.seen = 0

    def count(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        module.seen += 1
        return hidden * (1 + 0.05 * module.seen)

    _wrap(model, count)


def keeps_a_tensor_of_each_step(model: Any) -> None:
    def keep(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        module.kept = hidden.mean()
        return hidden

    _wrap(model, keep)


def counts_out_of_sight(model: Any) -> None:
    """Where no walk over the model finds it: only the next step shows it."""
    seen = [0]

    def count(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        seen[0] += 1
        return hidden * (1 + 2 * (seen[0] > 3))  # prefill, step, capture: the step after those is another

    _wrap(model, count)


def _wrap(model: Any, change: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    layer = type(model.model.layers[1].mlp)
    made = type(layer.__name__, (layer,), {"forward": lambda self, hidden: change(self, layer.forward(self, hidden))})
    model.model.layers[1].mlp.__class__ = made


CANNOT = {
    "a capture fails": reads_on_the_host,
    "a step changes what the model keeps": counts_on_the_host,
    "a step changes what the model keeps,": keeps_a_tensor_of_each_step,
}


@pytest.mark.parametrize("reason", CANNOT)
def test_what_cannot_be_captured_is_tried_once_and_stays_as_it_was(
    npu: torch.device, reason: str, captures: list[int]
) -> None:
    expected = []
    for static in (False, True):
        model = tiny("qwen3").to(npu)
        CANNOT[reason](model)
        npu_patch.apply(model)
        torch.manual_seed(3)
        for _ in range(2):
            expected.append(tokens(model, COUNT, do_sample=True, **(STATIC if static else {})))
        expected.append(torch.rand(3, device=npu).cpu())
    assert all(torch.equal(one, other) for one, other in zip(expected[:3], expected[3:], strict=True))
    found = {each: times for each, times in calls_of().fell_through.items() if "grows" not in each}
    assert list(found.values()) == [2] and reason.rstrip(",") in next(iter(found))
    assert len(captures) == ("fails" in reason) and calls_of().ran == 0


def test_a_replay_that_is_not_the_step_is_found_out_at_the_next_one(npu: torch.device) -> None:
    found = []
    for static in (False, True):
        model = tiny("qwen3").to(npu)
        counts_out_of_sight(model)
        npu_patch.apply(model)
        found.append(tokens(model, COUNT, **(STATIC if static else {})))
    assert calls_of().ran == 0
    assert any("a replay is not what the model does" in each for each in reasons())


def test_numbers_that_a_cache_counts_on_the_host_are_not_frozen(npu: torch.device) -> None:
    """Of windows in a cache of the caller's: a capture would write beyond them once they are full."""
    model = tiny("gemma3").to(npu)
    expected = tokens(model, 40)
    npu_patch.apply(model)
    cache = StaticCache(config=model.config, max_cache_len=64)
    assert torch.equal(tokens(model, 40, past_key_values=cache), expected)
    assert reasons() == ["StaticSlidingWindowLayer.cumulative_length_int changes on the host with each token"]


def _hooked(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)


def _moved_by_accelerate(model: Any) -> None:
    from accelerate import dispatch_model

    dispatch_model(model, {"": 0}, force_hooks=True)


def _compiled(model: Any) -> None:
    model.model.layers[0].mlp.compile(backend="eager")


def _compiled_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")


@pytest.mark.parametrize(
    "change, reason",
    [
        (_hooked, "hooks on modules of the model"),
        (_compiled, "a part of the model is compiled"),
        (_compiled_forward, "a part of the model is compiled"),
        (_moved_by_accelerate, "accelerate moves modules of the model"),
    ],
)
def test_a_model_that_others_watch_or_run_decodes_step_by_step(
    npu: torch.device, change: Callable[[Any], None], reason: str
) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    tokens(model, 4, **STATIC)
    change(model)
    before = calls_of().ran
    tokens(model, 4, **STATIC)
    assert calls_of().ran == before and reasons() == [reason]


@pytest.mark.parametrize(
    "how, reason",
    [
        ({}, "a cache that grows (DynamicCache)"),
        ({"use_cache": False}, "no cache"),
        (
            {**STATIC, "output_hidden_states": True, "return_dict_in_generate": True},
            "attentions or hidden states are asked for",
        ),
    ],
)
def test_calls_of_another_kind_say_why(npu: torch.device, how: dict[str, Any], reason: str) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    given = {name: tensor.to(npu) for name, tensor in prompt().items()}
    model.generate(**given, max_new_tokens=4, pad_token_id=0, **how)
    assert reasons() == [reason] and calls_of().ran == 0


def test_beams_fall_through(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    how = {"num_beams": 3, "repetition_penalty": 1.0}
    expected = tokens(model, COUNT, **how, **STATIC)
    npu_patch.apply(model)
    assert torch.equal(tokens(model, COUNT, **how, **STATIC), expected)
    assert dict(calls_of("_beam_search").fell_through) == {"beam search reorders the cache": 1}


def test_hooks_that_transformers_leaves_behind_listen_to_nobody(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    model(input_ids=torch.ones(1, 3, dtype=torch.long, device=npu), output_hidden_states=True)
    assert any(module._forward_hooks for module in model.modules())
    tokens(model, COUNT, **STATIC)
    assert calls_of().ran == CAPTURED and not reasons()


def test_gradients_are_left_to_the_steps_themselves(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    given = {name: tensor.to(npu) for name, tensor in prompt().items()}
    type(model).generate.__wrapped__(model, **given, max_new_tokens=4, pad_token_id=0, **STATIC)
    assert reasons() == ["gradients are wanted"] and calls_of().ran == 0


def test_dropout_draws_what_it_draws_step_by_step(npu: torch.device) -> None:
    model = adapted_model("qwen3", dropout=0.5).to(npu)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.scaling["default"] = layer.mlp.down_proj.scaling["default"] = 9.0
    found = []
    for captured in (False, True, True):
        npu_patch.apply(model, captured_decode=captured)
        torch.manual_seed(5)
        found.append(tokens(model, 12, **STATIC))
    assert calls_of().ran == 2 * 11 - COMPARED
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.manual_seed(6)
    assert not torch.equal(tokens(model, 12, **STATIC), found[0])


def test_casts_of_autocast_are_made_at_each_replay(npu: torch.device) -> None:
    """Autocast keeps them to the end of its block, and no graph may read them later."""
    precision = PRECISIONS["bfloat16, float32 adapters, autocast"]
    model = adapted_model("qwen3", precision=precision).eval().to(npu)
    npu_patch.apply(model, lora=False)
    found = []
    for _ in range(2):
        for how in (STATIC, {}):
            with precision.around(npu):
                found.append(tokens(model, COUNT, **how))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3]) and not torch.equal(found[0], found[2])
    assert calls_of().ran == CAPTURED + REPLAYED


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference_mode_and_no_grad_in_turns(npu: torch.device, mode: Any) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    expected = tokens(model, COUNT, **STATIC)
    with mode():
        assert torch.equal(tokens(model, COUNT, **STATIC), expected)
    assert torch.equal(tokens(model, COUNT, **STATIC), expected)


def test_a_cache_that_the_caller_gets_is_the_callers(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    tokens(model, COUNT, **STATIC)
    given = {name: tensor.to(npu) for name, tensor in prompt(seed=5).items()}
    how = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0}
    result = model.generate(**given, **how, **STATIC, return_dict_in_generate=True, output_scores=True)
    keys = [layer.keys.clone() for layer in result.past_key_values.layers]
    assert torch.equal(result.sequences[:, 9:].cpu(), tokens(model, COUNT, prompt(seed=5), repetition_penalty=1.0))
    before = calls_of().ran
    for seed in (1, 6):
        tokens(model, COUNT, prompt(seed=seed), **STATIC)
    assert calls_of().ran == before + 2 * REPLAYED
    assert all(torch.equal(layer.keys, each) for layer, each in zip(result.past_key_values.layers, keys, strict=True))


def test_a_cache_of_the_callers_is_gone_on_with_and_freed(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    cache = StaticCache(config=model.config, max_cache_len=64)
    batch = {"input_ids": prompt()["input_ids"]}
    npu_patch.apply(model)
    first = tokens(model, COUNT, batch, past_key_values=cache)
    further = {"input_ids": torch.cat([batch["input_ids"], first], 1)}
    assert torch.equal(tokens(model, COUNT, further, past_key_values=cache), tokens(model, COUNT, further))
    cache.reset()
    before = calls_of().ran
    assert torch.equal(tokens(model, COUNT, batch, past_key_values=cache), first)
    assert calls_of().ran == before + REPLAYED
    freed = weakref.ref(cache)
    del cache
    gc.collect()
    assert freed() is None


def test_a_cache_that_is_too_short_is_never_written_beyond(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    batch = {"input_ids": prompt()["input_ids"]}
    found = []
    for captured in (False, True):
        with npu_patch.applied(model, captured_decode=captured):
            cache = StaticCache(config=model.config, max_cache_len=14)
            with pytest.raises((IndexError, RuntimeError)) as error:
                tokens(model, COUNT, batch, past_key_values=cache)
            found.append(type(error.value))
            assert not captured or reasons() == ["the cache is full"]
    assert found[0] is found[1]


class Asking(LogitsProcessor):
    """Generates within generate()."""

    def __init__(self, model: Any) -> None:
        self.model, self.heard = model, []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.heard.append(tokens(self.model, 5, **STATIC))
        return scores


@pytest.mark.parametrize("same", [True, False], ids=["the same model", "another model"])
def test_generate_within_generate(npu: torch.device, same: bool) -> None:
    model, other = tiny("qwen3").to(npu), tiny("qwen3_5", seed=4).to(npu)
    asked = model if same else other
    expected, inner = tokens(model, COUNT), tokens(asked, 5)
    npu_patch.apply(model)
    npu_patch.apply(other)
    for _ in range(2):
        asking = Asking(asked)
        assert torch.equal(tokens(model, COUNT, logits_processor=LogitsProcessorList([asking]), **STATIC), expected)
        assert len(asking.heard) == COUNT and all(torch.equal(each, inner) for each in asking.heard)
    busy = calls_of().fell_through["its cache is in use by another call of generate()"]
    assert busy == (2 * COUNT if same else 0)


def test_two_models_in_turns(npu: torch.device) -> None:
    models = [tiny("qwen3", seed=seed).to(npu) for seed in (0, 1)]
    npu_patch.apply(models[0])
    npu_patch.apply(models[1])
    expected = [tokens(model, COUNT) for model in models]
    for number in range(3):
        for model, each in zip(models, expected, strict=True):
            assert torch.equal(tokens(model, COUNT, **STATIC), each)
        assert calls_of().ran == 2 * CAPTURED + 2 * number * REPLAYED


class Waiting(LogitsProcessor):
    """Lets another thread go on in the midst of generate()."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == 14:
            self.reached.set()
            assert self.go_on.wait(60)
        return scores


def test_another_thread_decodes_step_by_step_meanwhile(npu: torch.device) -> None:
    models = [tiny("qwen3", seed=seed).to(npu) for seed in (0, 1)]
    for model in models:
        npu_patch.apply(model)
    expected = [tokens(model, 12, **STATIC) for model in models]
    waiting, found = Waiting(), []
    how = {**STATIC, "logits_processor": LogitsProcessorList([waiting])}
    thread = threading.Thread(target=lambda: found.append(tokens(models[0], 12, **how)))
    thread.start()
    assert waiting.reached.wait(60)
    before = calls_of().ran
    found.append(tokens(models[1], 12, **STATIC))
    assert calls_of().ran == before
    waiting.go_on.set()
    thread.join()
    assert torch.equal(found[1], expected[0]) and torch.equal(found[0], expected[1])
    assert dict(calls_of().fell_through) == {"another thread generates on the device": 1}
    assert torch.equal(tokens(models[1], 12, **STATIC), expected[1])
    assert calls_of().fell_through.total() == 1


def test_few_graphs_and_caches_are_kept_of_a_model(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    for batch in range(1, 7):
        tokens(model, 5, prompt(batch=batch), **STATIC)
    of_model = kept.KEPT.of(model)
    assert [lease.kind[0] for lease in of_model.leases] == [3, 4, 5, 6]
    assert len(of_model.steps) == 4
    for length in (100, 200, 300):
        tokens(model, 5, prompt(batch=6, length=length), **STATIC)
    assert len(of_model.leases) == 4 and len(of_model.steps) <= kept.MOST_STEPS


@pytest.mark.parametrize("by", ["restore", "the end of the model", "free_decoding"])
def test_what_is_kept_goes_with(npu: torch.device, by: str) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    tokens(model, COUNT, **STATIC)
    of_model = kept.KEPT.of(model)
    gone = [weakref.ref(of_model.leases[0].cache), weakref.ref(of_model.steps[0].step.graph)]
    gone += [weakref.ref(of_model.steps[0].step.inputs.tokens)]
    del of_model
    if by == "restore":
        npu_patch.restore()
    elif by == "free_decoding":
        npu_patch.free_decoding(torch.nn.Linear(1, 1))
        assert gone[0]() is not None
        npu_patch.free_decoding(torch.nn.Sequential(model))
    else:
        gone.append(weakref.ref(model))
        del model
    gc.collect()
    assert [each() for each in gone] == [None] * len(gone)
