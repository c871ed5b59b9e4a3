"""Hooks that only ask for gradients are told from all others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from npu_patch.decoding.gradient_hooks import only_asks_for_gradients
from npu_patch.decoding.host_state import observe

TINY = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
seen: list[Any] = []


def _model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**TINY, num_attention_heads=2, num_key_value_heads=2))


def _by_transformers() -> torch.nn.Module:
    model = _model()
    model.enable_input_require_grads()
    return model.get_input_embeddings()


def _by_peft() -> torch.nn.Module:
    model = _model()
    model.gradient_checkpointing_enable()
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    return model.get_base_model().get_input_embeddings()


@pytest.mark.parametrize("made", [_by_transformers, _by_peft])
def test_those_of_transformers_and_peft_are_known(made: Callable[[], torch.nn.Module]) -> None:
    hooks = list(made()._forward_hooks.values())
    assert hooks and all(map(only_asks_for_gradients, hooks))


def _other_value(module: Any, input: Any, output: Any) -> None:
    output.requires_grad_(False)


def _one_thing_more(module: Any, input: Any, output: Any) -> None:
    output.requires_grad_(True)
    seen.append(output)


def _returns(module: Any, input: Any, output: Any) -> Any:
    return output.requires_grad_(True)


def _of_the_input(module: Any, input: Any, output: Any) -> None:
    input.requires_grad_(True)


def _another_method(module: Any, input: Any, output: Any) -> None:
    output.retain_grad_(True)


class Listener:
    def __call__(self, module: Any, input: Any, output: Any) -> None:
        output.requires_grad_(True)


@pytest.mark.parametrize(
    "hook", [_other_value, _one_thing_more, _returns, _of_the_input, _another_method, Listener(), seen.append]
)
def test_any_other_hook_is_not(hook: Any) -> None:
    assert not only_asks_for_gradients(hook)


def test_checkpointing_that_is_turned_off_and_on_again_leaves_a_model_as_it_was() -> None:
    """As trl does around each rollout: what is made anew then means what it meant before."""
    model = _model()
    states = []
    for _ in range(2):
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        states.append(observe(model, "cpu"))
        model.disable_input_require_grads()
        states.append(observe(model, "cpu"))
        model.gradient_checkpointing_disable()
        states.append(observe(model, "cpu"))
    assert [each.why_not for each in states] == [None] * 6
    assert [one.state == other.state for one, other in zip(states[:3], states[3:], strict=True)] == [True] * 3
    assert states[0].state != states[2].state
