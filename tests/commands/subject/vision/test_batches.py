"""Batches with pictures: what the model is given is what its own processor makes, placed where tokens stand for it."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from npu_patch.commands.console.result import CommandError
from npu_patch.commands.subject.vision.drawing import COLOURS, SHAPES, drawn, filmed
from npu_patch.commands.subject.vision.families import FAMILIES, IMAGE, PAD, VIDEO
from npu_patch.commands.subject.vision.models import linear_layers, tiny_vision_model
from npu_patch.commands.subject.vision.reading import processor_of, read
from tests.support.vision_cases import FULL, IMAGES, PACKED, batch_of, logits, made, rows_of
from tests.support.vision_cases import VIDEO as A_VIDEO


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_is_drawn_in_its_colour(shape: str) -> None:
    for colour, value in COLOURS.items():
        image = drawn(shape, colour, 30, 40, seed=3)
        assert image.shape == (30, 40, 3) and image.dtype == np.uint8
        assert 20 < (image == value).all(-1).sum() < 30 * 40 / 2
    assert (drawn(shape, "red", 30, 40, seed=3) != drawn(shape, "red", 30, 40, seed=4)).any()


def test_what_cannot_be_drawn_names_what_can() -> None:
    with pytest.raises(ValueError, match="'star' in 'red': accepted are disc, square, triangle"):
        drawn("star", "red", 8, 8)


def test_a_film_moves() -> None:
    film = filmed(4, 24, 32)
    assert film.shape == (4, 24, 32, 3) and all((film[at] != film[at + 1]).any() for at in range(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shorter_sequence_is_padded_at_the_left_and_only_words_have_labels(family: str) -> None:
    batch = batch_of(made(family, FULL), family, IMAGES)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert int(mask[:, 0].sum()) == 1 and bool((mask[:, -1] == 1).all()) and bool(((ids == PAD) == (mask == 0)).all())
    assert bool((batch["labels"][(ids == IMAGE) | (ids == PAD)] == -100).all()) and bool((batch["labels"] >= 0).any())
    assert ids.dtype == torch.long and int((ids == IMAGE).sum()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_are_those_of_the_padded_batch(family: str) -> None:
    model = made(family, FULL)
    padded, packed = batch_of(model, family, IMAGES), batch_of(model, family, PACKED)
    kept = padded["attention_mask"].bool()
    assert torch.equal(packed["input_ids"][0], padded["input_ids"][kept])
    assert packed["position_ids"].shape[-1] == int(kept.sum()) and "attention_mask" not in packed
    if not FAMILIES[family].packs:
        return
    with torch.no_grad():
        torch.testing.assert_close(logits(model, packed)[0], logits(model, padded)[kept], rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.videos])
def test_a_video_has_its_tokens(family: str) -> None:
    model = made(family, FULL)
    batch = batch_of(model, family, A_VIDEO)
    token = VIDEO if FAMILIES[family].read == "grids" else IMAGE
    assert int((batch["input_ids"][0] == token).sum()) >= 8
    with torch.no_grad():
        assert bool(logits(model, batch).isfinite().all())


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_reach_the_logits(family: str) -> None:
    model = made(family, FULL)
    batch = batch_of(model, family, IMAGES)
    with torch.no_grad():
        seen = logits(model, batch)
        changed = logits(model, {**batch, "pixel_values": batch["pixel_values"].flip(0)})
    assert (seen - changed).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_language_model_are_those_outside_the_tower(family: str) -> None:
    model = made(family, FULL)
    language = linear_layers(model, FAMILIES[family], tower=False)
    everything = linear_layers(model, FAMILIES[family], tower=True)
    vision = set(everything) - set(language)
    assert set(language) < set(everything) and vision and "lm_head" not in everything
    assert all("language_model" in name or "text_model" in name for name in language)
    assert not any("language_model" in name or "text_model" in name for name in vision)


def test_every_expert_is_chosen_where_that_is_wanted() -> None:
    model = tiny_vision_model("qwen3_vl_moe", every_expert=True)
    assert model.config.text_config.num_experts_per_tok == model.config.text_config.num_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_not_take_is_left_out(family: str) -> None:
    model = made(family, FULL)
    assert set(batch_of(model, family, IMAGES)) <= set(inspect.signature(type(model).forward).parameters)


def test_errors_name_the_family_and_what_is_accepted() -> None:
    with pytest.raises(CommandError, match="'qwen9_vl' is no family with pictures: accepted are qwen2_vl, "):
        tiny_vision_model("qwen9_vl")
    with pytest.raises(CommandError, match="Gemma3Config: the family takes no videos"):
        read(FAMILIES["gemma3"], [[filmed(2, 16, 16)]])
    with pytest.raises(CommandError, match="SmolVLMConfig: a batch has images or videos"):
        read(FAMILIES["smolvlm"], [[filmed(2, 16, 16)], [drawn("disc", "red", 16, 16)]])


def test_images_are_read_without_torchvision() -> None:
    assert {type(processor_of(family.images)).__name__[-3:] for family in FAMILIES.values()} == {"Pil"}


def test_sizes_differ_within_a_batch() -> None:
    rows = rows_of("qwen2_vl", IMAGES)
    assert len({picture.shape for row in rows for picture in row}) == 3
