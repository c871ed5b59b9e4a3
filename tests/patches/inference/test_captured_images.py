"""Steps after a prompt with images: positions that a prefill keeps on the model are those of its own call."""

from __future__ import annotations

import copy

import pytest
import torch

import npu_patch
from tests.support.generating import COMPARED, STATIC, calls_of, prompt, tokens
from tests.support.vision_cases import FULL, IMAGES, batch_of, made


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_calls_with_and_without_images_have_their_own_tokens(family: str, npu: torch.device) -> None:
    model = made(family, FULL)
    on_cpu = copy.deepcopy(model).cpu()
    images = batch_of(on_cpu, family, IMAGES)
    images.pop("labels")
    darker = {**images, "pixel_values": images["pixel_values"] * -0.5}
    prompts = [images, prompt(length=images["input_ids"].shape[1]), darker, images]
    expected = [tokens(on_cpu, 12, each, use_cache=True) for each in prompts]
    assert not torch.equal(expected[0], expected[2])
    model.to(npu)
    with npu_patch.applied(model):
        for each, right in zip(prompts, expected, strict=True):
            assert torch.equal(tokens(model, 12, each, use_cache=True, **STATIC), right)
        assert calls_of().ran >= len(prompts) * (11 - COMPARED) and not calls_of().fell_through
