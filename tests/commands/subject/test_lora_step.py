"""Models that the commands make by themselves take the step that the commands measure."""

from __future__ import annotations

import pytest
import torch

from npu_patch.commands.subject.lora_step import lora_step
from npu_patch.commands.subject.models import batch_for
from npu_patch.commands.subject.tiny_model import tiny_model


@pytest.mark.parametrize("model_type", ["clip", "t5"])
def test_tiny_models_of_text_encoders_and_of_encoder_decoders_take_a_step(model_type: str) -> None:
    model = tiny_model(model_type)
    adapted, step = lora_step(model, batch_for(model, length=5))
    before = {name: each.detach().clone() for name, each in adapted.named_parameters()}
    step()
    changed = {name for name, each in adapted.named_parameters() if not torch.equal(each, before[name])}
    assert any("lora_B" in name for name in changed)  # zero before, so no decay of weights moves it
    assert all("lora_" in name for name in changed)
