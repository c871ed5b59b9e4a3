"""Arguments of a step at addresses that stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_patch.decoding.inputs import StepInputs, shape_of, why_not


def grown(length: int, **other: Any) -> dict[str, Any]:
    """What generate() has of `length` tokens, the first of them padding."""
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, 0] = 0
    positions = torch.arange(length)[None]
    return {"attention_mask": mask, "position_ids": positions, "use_cache": True, "past_key_values": object(), **other}


def tokens(length: int) -> torch.Tensor:
    return torch.arange(3, 3 + length)[None]


def test_what_is_counted_on_is_what_generate_lets_grow() -> None:
    inputs = StepInputs.of(tokens(5), grown(5), 16)
    assert inputs.tokens.tolist() == [[7]]
    assert inputs.tensors["attention_mask"].tolist() == [[0] + [1] * 15]
    inputs.count_on()
    assert inputs.differ_from(grown(6)) is None


@pytest.mark.parametrize(
    "change, name",
    [
        ({"position_ids": torch.arange(1, 7)[None]}, "position_ids"),
        ({"attention_mask": torch.zeros(1, 6, dtype=torch.long)}, "attention_mask"),
        ({"step": 2}, "step"),
        ({"use_cache": False}, "use_cache"),
    ],
)
def test_an_argument_that_grows_otherwise_is_named(change: dict[str, Any], name: str) -> None:
    inputs = StepInputs.of(tokens(5), grown(5), 16)
    inputs.count_on()
    assert inputs.differ_from(grown(6, **change)) == name


def test_a_later_call_is_loaded_at_the_same_addresses() -> None:
    inputs = StepInputs.of(tokens(9), grown(9), 16)
    addresses = [tensor.data_ptr() for tensor in (inputs.tokens, *inputs.tensors.values())]
    inputs.load(tokens(4), grown(4))
    assert inputs.differ_from(grown(4)) is None and inputs.tokens.tolist() == [[6]]
    assert addresses == [tensor.data_ptr() for tensor in (inputs.tokens, *inputs.tensors.values())]


def test_lengths_and_pictures_of_a_prompt_do_not_tell_steps_apart() -> None:
    shape = shape_of(tokens(5), grown(5, pixel_values=torch.ones(3), image_grid_thw=torch.ones(1)))
    assert shape == shape_of(tokens(7), grown(7, pixel_values=torch.ones(8), image_grid_thw=torch.ones(2)))
    assert shape != shape_of(tokens(5), grown(5, position_ids=torch.arange(15).reshape(3, 1, 5)))
    assert shape != shape_of(tokens(5), grown(5, use_cache=False))
    assert not StepInputs.of(tokens(5), grown(5, pixel_values=torch.ones(3)), 16).others.keys() & {"pixel_values"}


@pytest.mark.parametrize(
    "argument, words",
    [
        ({"encoder_outputs": (torch.ones(1),)}, "the argument encoder_outputs, a tuple"),
        ({"attention_mask": torch.ones(1, 1, 5, 5)}, "an attention mask that is not one of tokens"),
    ],
)
def test_arguments_that_have_no_address_are_refused(argument: dict[str, Any], words: str) -> None:
    assert why_not(grown(5)) is None
    assert why_not(grown(5, **argument)) == words
