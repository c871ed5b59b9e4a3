"""Steps after a prompt with images: positions that a prefill keeps on the model are those of its own call."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import npu_patch
from tests.support.generating import COMPARED, STATIC, calls_of, prompt, tokens
from tests.support.vision_cases import FULL, IMAGES, batch_of, made


def the_other_way_round(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Its two rows, of which the first has all images but the last: the positions of their tokens are others."""
    of_rows = {name: each.flip(0) for name, each in batch.items() if name not in ("pixel_values", "image_grid_thw")}
    last = int(batch["image_grid_thw"][-1].prod())
    pixels, grid = batch["pixel_values"], batch["image_grid_thw"]
    return {**of_rows, "pixel_values": pixels.roll(last, 0), "image_grid_thw": grid.roll(1, 0)}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_calls_with_and_without_images_have_their_own_tokens(family: str, npu: torch.device) -> None:
    model = made(family, FULL)
    on_cpu = copy.deepcopy(model).cpu()
    images = batch_of(on_cpu, family, IMAGES)
    images.pop("labels")
    prompts = [images, prompt(length=images["input_ids"].shape[1]), the_other_way_round(images), images]
    expected = [tokens(on_cpu, 12, each, use_cache=True) for each in prompts]
    model.to(npu)
    with npu_patch.applied(model):
        for each, right in zip(prompts, expected, strict=True):
            assert torch.equal(tokens(model, 12, each, use_cache=True, **STATIC), right)
        assert calls_of().ran >= len(prompts) * (11 - COMPARED) and not calls_of().fell_through
