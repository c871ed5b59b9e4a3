"""What a captured step has frozen may change before the next call of generate(), or between two of its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import npu_patch
from tests.support.generating import COMPARED, STATIC, calls_of, prompt, reasons, tokens
from tests.support.lora_models import adapted_model
from tests.support.tiny_models import tiny

COUNT = 8
CAPTURED, REPLAYED = COUNT - 1 - COMPARED, COUNT - 1
HEADS = "transformers.models.qwen3.modeling_qwen3"


def adapted(npu: torch.device) -> Any:
    model = adapted_model("qwen3").eval().to(npu)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj"], init_lora_weights=False))
    return model.to(npu)


def layers_of(model: Any) -> Any:
    return model.get_base_model().model.layers


def _written_to(model: Any) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)


def _moved(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.3


def _scaled(model: Any) -> None:
    for layer in layers_of(model):
        layer.self_attn.q_proj.scaling["default"] = 5.0


def _rescaled_rope(model: Any) -> None:
    rope = model.get_base_model().model.rotary_emb
    rope.inv_freq = rope.inv_freq * 0.5


def _reconfigured(model: Any) -> None:
    model.get_base_model().config.rms_norm_eps = 0.5
    for layer in layers_of(model):
        layer.input_layernorm.variance_epsilon = 0.5


def _layer_dropped(model: Any) -> None:
    del model.get_base_model().model.layers[1]
    model.get_base_model().config.num_hidden_layers = 1


CHANGES: dict[str, tuple[Callable[[Any], Any], int]] = {
    "weights written in place": (_written_to, REPLAYED),
    "weights moved": (_moved, CAPTURED),
    "to bfloat16": (lambda model: (_written_to(model), model.to(torch.bfloat16)), CAPTURED),
    "adapter switched": (lambda model: model.set_adapter("second"), CAPTURED),
    "adapters disabled": (lambda model: model.base_model.disable_adapter_layers(), CAPTURED),
    "merged": (lambda model: (_scaled(model), model.merge_adapter()), CAPTURED),
    "scaling": (_scaled, CAPTURED),
    "buffer replaced": (_rescaled_rope, CAPTURED),
    "plain attributes": (_reconfigured, CAPTURED),
    "a layer less": (_layer_dropped, CAPTURED),
    "adapter deleted": (lambda model: model.delete_adapter("default"), CAPTURED),
}
SAME: dict[str, tuple[Callable[[Any], Any], int]] = {
    "nothing": (lambda model: None, REPLAYED),
    "train": (lambda model: model.train(), CAPTURED),
    "merged": (lambda model: model.merge_adapter(), CAPTURED),
    "attention": (lambda model: model.get_base_model().set_attn_implementation("eager"), CAPTURED),
    "applied again": (lambda model: npu_patch.apply(model, rope=False), REPLAYED),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(npu: torch.device, change: str) -> None:
    model = adapted(npu)
    npu_patch.apply(model)
    first = tokens(model, COUNT, **STATIC)
    ran = calls_of().ran
    make, replays = CHANGES[change]
    make(model)
    found = tokens(model, COUNT, **STATIC)
    assert calls_of().ran - ran == replays
    expected = tokens(model, COUNT)
    assert torch.equal(found, expected) and not torch.equal(found, first)


@pytest.mark.parametrize("change", SAME)
def test_a_change_that_leaves_the_function_as_it_is(npu: torch.device, change: str) -> None:
    model = adapted(npu)
    npu_patch.apply(model)
    first = tokens(model, COUNT, **STATIC)
    ran = calls_of().ran
    make, replays = SAME[change]
    make(model)
    assert torch.equal(tokens(model, COUNT, **STATIC), first)
    assert calls_of().ran - ran == replays


def test_adapters_in_turns_keep_their_graphs(npu: torch.device) -> None:
    model = adapted(npu)
    npu_patch.apply(model)
    expected: dict[str, torch.Tensor] = {}
    for number in range(3):
        for adapter in ("default", "second"):
            model.set_adapter(adapter)
            found = tokens(model, COUNT, **STATIC)
            assert torch.equal(found, expected.setdefault(adapter, tokens(model, COUNT)))
        assert calls_of().ran == 2 * CAPTURED + 2 * number * REPLAYED
    assert not torch.equal(*expected.values())


def test_a_step_of_a_restored_and_applied_patch_is_captured_anew(npu: torch.device) -> None:
    model = adapted(npu)
    npu_patch.apply(model)
    first = tokens(model, COUNT, **STATIC)
    npu_patch.restore()
    npu_patch.apply(model, rms_norm=False)
    assert torch.equal(tokens(model, COUNT, **STATIC), first)
    assert calls_of().ran == CAPTURED


def test_what_a_further_apply_binds_is_captured(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, fused_ops=False)
    first = tokens(model, COUNT, **STATIC)
    npu_patch.apply(model)
    assert torch.equal(tokens(model, COUNT, **STATIC), first)
    assert calls_of().ran == 2 * CAPTURED


def test_a_function_that_somebody_binds_anew_is_seen(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, fused_ops=False)
    first = tokens(model, COUNT, **STATIC)
    module = sys.modules[HEADS]
    original = module.apply_rotary_pos_emb
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, *more, **named: original(q * 3, k, *more, **named))
    found = tokens(model, COUNT, **STATIC)
    assert torch.equal(found, tokens(model, COUNT)) and not torch.equal(found, first)


class Between(LogitsProcessor, StoppingCriteria, BaseStreamer):
    """Somebody's code between the steps: it changes the model once there are `at` tokens."""

    def __init__(self, change: Callable[[], Any], at: int = 14) -> None:
        self.change, self.at, self.seen = change, at, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> Any:
        self._count(input_ids.shape[1])
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=bool, device="npu:0")

    def put(self, value: torch.Tensor) -> None:
        self._count(self.seen + (value.shape[-1] if value.dim() > 1 else 1))

    def end(self) -> None:
        pass

    def _count(self, seen: int) -> None:
        if self.seen < self.at <= seen:
            self.change()
        self.seen = seen


WAYS: dict[str, Callable[[Between], dict[str, Any]]] = {
    "logits processor": lambda between: {"logits_processor": LogitsProcessorList([between])},
    "stopping criterion": lambda between: {"stopping_criteria": StoppingCriteriaList([between])},
    "streamer": lambda between: {"streamer": between},
}


@pytest.mark.parametrize("kept", [False, True], ids=["captured in this call", "kept from an earlier call"])
@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_changes_between_two_steps(npu: torch.device, way: str, kept: bool) -> None:
    model = adapted(npu)
    batch = prompt(batch=1, padding=2)

    def run(**how: Any) -> torch.Tensor:
        model.set_adapter("default")
        between = Between(lambda: model.set_adapter("second"))
        return tokens(model, 12, batch, **WAYS[way](between), **how)

    expected = run()
    model.set_adapter("default")
    assert not torch.equal(expected, tokens(model, 12, batch))
    npu_patch.apply(model)
    if kept:
        tokens(model, 12, batch, **STATIC)
    assert torch.equal(run(**STATIC), expected)
    assert calls_of().ran > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_hook_that_is_registered_between_two_steps_hears_those_that_follow(npu: torch.device, way: str) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    heard: list[int] = []
    batch = prompt(batch=1, padding=2)
    between = Between(lambda: model.model.layers[0].register_forward_hook(lambda *_: heard.append(1)))
    found = tokens(model, 12, batch, **WAYS[way](between), **STATIC)
    assert len(heard) in (6, 7)
    assert reasons() == ["hooks on modules of the model"]
    assert torch.equal(found, tokens(model, 12, batch))


def test_a_patch_that_is_restored_between_two_steps(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    expected = tokens(model, 12)
    npu_patch.apply(model)
    between = Between(npu_patch.restore)
    assert torch.equal(tokens(model, 12, **WAYS["logits processor"](between), **STATIC), expected)


def test_adapters_that_are_disabled_for_one_call(npu: torch.device) -> None:
    model = adapted(npu)
    npu_patch.apply(model)
    first = tokens(model, COUNT, **STATIC)
    with model.disable_adapter():
        bare = tokens(model, COUNT, **STATIC)
        assert torch.equal(bare, tokens(model, COUNT))
    assert not torch.equal(bare, first)
    assert torch.equal(tokens(model, COUNT, **STATIC), first)
