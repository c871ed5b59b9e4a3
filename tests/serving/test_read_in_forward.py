"""What the host reads of a model's inputs: in one copy, views of them too, and for one forward alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.serving.read_in_forward import Forward, forward_of, running

MODEL = torch.nn.Linear(1, 1)


def inputs(npu: torch.device) -> dict[str, Tensor]:
    return {
        "ids": torch.arange(12, device=npu).view(2, 6),
        "mask": torch.tensor([[0, 1], [1, 1]], device=npu).bool(),
        "grid": torch.tensor([[1, 4, 6]], device=npu, dtype=torch.int32),
        "positions": torch.arange(40, device=npu).view(4, 2, 5),
        "seconds": torch.tensor([0.5, -1.25], device=npu),
        "half": torch.tensor([0.5, -1.25], device=npu, dtype=torch.bfloat16),
    }


@pytest.mark.usefixtures("simulated")
def test_all_dtypes_are_read_in_one_copy_bit_by_bit(npu: torch.device) -> None:
    given, forward = inputs(npu), Forward()
    with simulator.count() as counted:
        forward.read(list(given.values()))
        forward.read(list(given.values()))
    assert counted.host_copies == 1
    for tensor in given.values():
        known = forward.known(tensor)
        assert known is not None and known.dtype == tensor.dtype and torch.equal(known, tensor.cpu())


VIEWS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "row": ("positions", lambda tensor: tensor[1]),
    "some of all": ("positions", lambda tensor: tensor[1:, :, 2:]),
    "transposed": ("ids", lambda tensor: tensor.T),
    "every other": ("ids", lambda tensor: tensor[:, ::2]),
    "flat": ("positions", lambda tensor: tensor.flatten(1)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_what_was_read_are_known(view: str, npu: torch.device) -> None:
    given, forward = inputs(npu), Forward()
    forward.read(list(given.values()))
    name, seen = VIEWS[view]
    tensor = seen(given[name])
    known = forward.known(tensor)
    assert known is not None and torch.equal(known, tensor.cpu())
    tensor.zero_()
    assert forward.known(tensor) is None and forward.known(given[name]) is None


def test_what_lies_beside_what_was_read_is_not_known(npu: torch.device) -> None:
    both, forward = torch.arange(10, device=npu), Forward()
    forward.read([both[:5]])
    first = forward._reads[next(iter(forward._reads))].tensor
    assert forward.known(both[3:8]) is None and forward.known(both[6:]) is None
    assert forward.known(first[1:3]).tolist() == [1, 2]


def test_what_it_hands_out_may_be_written_to(npu: torch.device) -> None:
    given, forward = inputs(npu), Forward()
    forward.values(given["grid"]).zero_()
    assert forward.values(given["grid"]).tolist() == [[1, 4, 6]]


def test_it_lasts_for_the_outermost_forward(npu: torch.device) -> None:
    ids = inputs(npu)["ids"]
    assert running() is None
    with forward_of(MODEL) as outer:
        outer.read([ids])
        with forward_of(MODEL) as inner:
            assert inner is outer is running()
        assert running() is outer
    assert running() is None
    with forward_of(MODEL) as another:
        assert another.known(ids) is None


def test_a_compiled_part_is_seen(npu: torch.device) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with forward_of(model) as forward:
        assert not forward.compiled
    model[0].compile(backend="eager")
    with forward_of(model) as forward:
        assert forward.compiled
    with forward_of(torch.nn.Sequential(torch.compile(torch.nn.Linear(1, 1), backend="eager"))) as forward:
        assert forward.compiled
