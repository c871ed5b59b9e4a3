"""What is worked out of a tensor once per step."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from npu_patch.serving.once_per_step import OncePerTensor


class Worked:
    """Something that can be referred to weakly."""


def test_layers_that_ask_for_the_same_tensors_in_turn_get_what_the_first_asked_for():
    kept, first, second = OncePerTensor(), torch.zeros(3), torch.zeros(3)
    found = {id(tensor): kept.of((tensor,), Worked) for tensor in (first, second)}
    assert found[id(first)] is not found[id(second)]
    for tensor in (first, second, first, first):
        assert kept.of((tensor,), Worked) is found[id(tensor)]
        assert kept.known(tensor) is found[id(tensor)]


@pytest.mark.parametrize("written", [0, 1])
def test_what_is_written_to_is_worked_out_anew(written):
    kept, tensors = OncePerTensor(), (torch.zeros(3), torch.zeros(3))
    before = kept.of(tensors, Worked)
    tensors[written].add_(1)
    after = kept.of(tensors, Worked)
    assert after is not before
    assert kept.of(tensors, Worked) is after


def test_another_second_tensor_is_another_question():
    kept, first = OncePerTensor(), torch.zeros(3)
    before = kept.of((first, torch.zeros(3)), Worked)
    assert kept.of((first, torch.zeros(3)), Worked) is not before


@pytest.mark.parametrize("asked", [1, 2])
def test_what_was_worked_out_goes_with_its_tensor(asked):
    """Also what was asked for last, before anybody asks again."""
    kept, tensor = OncePerTensor(), torch.zeros(3)
    reference = weakref.ref(kept.of((tensor,), Worked))
    for _ in range(asked - 1):
        kept.of((tensor,), Worked)
    assert reference() is not None
    del tensor
    gc.collect()
    assert reference() is None
