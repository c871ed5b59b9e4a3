"""Why decoder layers keep their forward: the residual add with RMSNorm, which is written inside it, is reached through
the token mixer and the norm instead (npu_patch/patches/add_rms_norm.py)."""

from __future__ import annotations

import inspect
import types

import pytest
from torch import nn

from tests.support.tiny_models import tiny, tiny_batch


def runs_of_the_first_layer(assign_to: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """In one training step with checkpointing, which runs each layer again in the backward."""
    model = tiny("qwen3").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer: nn.Module = model.model.layers[0]
    original = inspect.unwrap(type(layer).forward)

    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        return original(self, *args, **kwargs)

    if assign_to == "class":
        monkeypatch.setattr(type(layer), "forward", forward)
    elif assign_to == "instance":
        layer.forward = types.MethodType(forward, layer)
    runs = []
    layer.input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    model(**tiny_batch(length=5)).loss.backward()
    return len(runs)


def test_a_forward_assigned_to_a_decoder_layer_turns_its_checkpointing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_of_the_first_layer("nothing", monkeypatch) == 2
    assert runs_of_the_first_layer("instance", monkeypatch) == 1
    assert runs_of_the_first_layer("class", monkeypatch) == 1
