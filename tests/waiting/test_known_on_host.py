"""Integers whose values the host knows: what is asked about them is right, and waits for nothing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch import simulator
from npu_patch.waiting.known_on_host import KnownOnHost

GRID = torch.tensor([[2, 4, 6], [1, 6, 8]])
MASK = torch.tensor([[True, False, True, True], [False, False, True, False]])
X = torch.arange(24.0).reshape(2, 4, 3)
SOURCE = torch.arange(100.0, 112.0).reshape(4, 3)

# Of a grid alone: what models do with one on the way to positions and lengths.
ANSWERS: dict[str, Callable[[Tensor], Any]] = {
    "list": lambda grid: grid.tolist(),
    "a list of sizes": lambda grid: (grid.prod(-1) // 4).tolist(),
    "a loop": lambda grid: [int(t) * int(h) for t, h, w in grid],
    "the larger of two": lambda grid: int(max(grid[0][1], grid[0][2])),
    "an item": lambda grid: grid[0, 1].item(),
    "lengths": lambda grid: (
        F.pad(torch.repeat_interleave(grid[:, 1] * grid[:, 2], grid[:, 0]).cumsum(0, dtype=torch.int32), (1, 0))
    ).tolist(),
    "a range of it": lambda grid: list(range(grid[0][0])),
    "a sentence": lambda grid: f"{grid.sum()} of {grid[0, 0]}",
    "a truth": lambda grid: bool((grid > 0).all()),
    "another dtype": lambda grid: grid.to(torch.int32).tolist(),
    "its own device": lambda grid: grid.to(grid.device).tolist(),
    "on the host": lambda grid: grid.cpu().tolist(),
    "a copy": lambda grid: copy.deepcopy(grid).tolist(),
    "itself, contiguous": lambda grid: grid.contiguous().tolist(),
    "written in place": lambda grid: (grid.add_(1).tolist(), grid.tolist()),
    "membership": lambda grid: 6 in grid,
}


def known(values: Tensor, npu: torch.device) -> Tensor:
    found: Tensor = KnownOnHost(values.clone(), npu)
    return found


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("answer", ANSWERS)
def test_what_is_asked_of_it_alone_is_right_and_waits_for_nothing(answer: str, npu: torch.device) -> None:
    grid = known(GRID, npu)
    with simulator.count() as counted:
        found = ANSWERS[answer](grid)
    assert found == ANSWERS[answer](GRID.clone())
    assert counted.host_copies == 0 and counted.launches == 0


# Beside other tensors of the device: x `[2, 4, 3]`, a mask `[2, 4]`, a source of as many rows as the mask shows.
MEETINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "masked_scatter": lambda x, mask, source: x.masked_scatter(mask.unsqueeze(-1), source),
    "masked_scatter, expanded": lambda x, mask, source: x.masked_scatter(mask.unsqueeze(-1).expand_as(x), source),
    "masked_scatter, a longer source": lambda x, mask, source: x.masked_scatter(
        mask.unsqueeze(-1), torch.cat((source, source))
    ),
    "masked_scatter, element by element": lambda x, mask, source: x[..., 0].masked_scatter(mask, source.flatten()),
    "rows": lambda x, mask, source: x[mask],
    "rows and everything": lambda x, mask, source: x[mask, :],
    "elements of rows": lambda x, mask, source: x[mask.unsqueeze(-1).expand_as(x)],
    "a column of rows": lambda x, mask, source: x[mask, 1],
    "rows set": lambda x, mask, source: set_at(x.clone(), (mask, slice(None)), source),
    "rows of a view set": lambda x, mask, source: set_at(x.clone().transpose(1, 2).transpose(1, 2), mask, source),
    "rows set to one": lambda x, mask, source: set_at(x.clone(), mask, 1.0),
    "rows set by broadcasting": lambda x, mask, source: set_at(x.clone(), mask, source[0]),
    "a product": lambda x, mask, source: x * mask.unsqueeze(-1),
    "where": lambda x, mask, source: torch.where(mask.unsqueeze(-1), x, -x),
    "masked_fill": lambda x, mask, source: x.masked_fill(~mask.unsqueeze(-1), 5.0),
    "as indices": lambda x, mask, source: x.flatten(0, 1)[mask.long().flatten()],
    "as one index": lambda x, mask, source: x[mask.sum() - 3],
    "an embedding": lambda x, mask, source: F.embedding(mask.long(), x.flatten(0, 1)),
    "a size": lambda x, mask, source: x.new_zeros(mask.sum(), 3),
    "rows of a size": lambda x, mask, source: set_at(x.new_ones((mask.sum(), 3)), mask[mask], source),
    "joint": lambda x, mask, source: x[(mask | ~mask)[..., None][..., 0]],
}


def set_at(x: Tensor, index: Any, value: Any) -> Tensor:
    x[index] = value
    return x


@pytest.mark.parametrize("meeting", MEETINGS)
def test_beside_tensors_of_the_device_it_is_the_tensor_that_it_stands_for(meeting: str, npu: torch.device) -> None:
    def results(device: torch.device | str, mask: Tensor) -> list[Tensor]:
        x, source = (each.to(device).requires_grad_() for each in (X.clone(), SOURCE.clone()))
        found = MEETINGS[meeting](x, mask, source)
        if found.requires_grad:
            (found * torch.arange(1.0, found.numel() + 1, device=device).view(found.shape)).sum().backward()
        return [each.detach().cpu() for each in (found, x.grad, source.grad) if each is not None]

    expected = results("cpu", MASK)
    found = results(npu, known(MASK, npu))
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    "meeting", [each for each in MEETINGS if each.startswith(("masked_scatter", "rows", "a size"))]
)
def test_places_are_known_without_asking_the_device(meeting: str, npu: torch.device) -> None:
    x, source, mask = X.to(npu), SOURCE.to(npu), known(MASK, npu)
    with simulator.count() as counted:
        MEETINGS[meeting](x, mask, source)
    assert counted.host_copies == 0


@pytest.mark.usefixtures("simulated")
def test_a_mask_that_every_layer_uses_goes_to_the_device_once(npu: torch.device) -> None:
    x, source, mask = X.to(npu), SOURCE.to(npu), known(MASK, npu)
    with simulator.count() as counted:
        for _ in range(3):
            x = x.masked_scatter(mask.unsqueeze(-1), x[mask] + source) + mask.unsqueeze(-1)
            x[mask, :] = source
    assert counted.uploads <= 8  # unsqueezed anew each time, else once
    with simulator.count() as again:
        for _ in range(3):
            x[mask, :] = x[mask] + source
    assert again.uploads == 0


def test_what_is_written_to_it_is_known_on_both_sides(npu: torch.device) -> None:
    grid = known(GRID, npu)
    assert torch.equal((grid + torch.zeros(3, dtype=torch.long, device=npu)).cpu(), GRID)
    grid[:, 0] = 1
    assert grid.tolist() == [[1, 4, 6], [1, 6, 8]]
    assert (grid + torch.zeros(3, dtype=torch.long, device=npu)).tolist() == grid.tolist()
    grid += torch.ones(3, dtype=torch.long, device=npu)  # by a tensor of the device
    assert grid.tolist() == [[2, 5, 7], [2, 7, 9]]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_other_modes(mode: Any, npu: torch.device) -> None:
    with mode():
        mask = known(MASK, npu)
        for _ in range(2):
            assert torch.equal(X.to(npu)[mask].cpu(), X[MASK])
            assert torch.equal((X.to(npu) * mask.unsqueeze(-1)).cpu(), X * MASK.unsqueeze(-1))


def test_to_who_looks_at_it_it_is_a_tensor_of_the_device(npu: torch.device) -> None:
    mask = known(MASK, npu)
    assert isinstance(mask, Tensor)
    assert (mask.shape, mask.dtype, mask.device, mask.dim(), mask.is_floating_point()) == (
        MASK.shape,
        MASK.dtype,
        npu,
        2,
        False,
    )
    assert type(mask.to("cpu")) is Tensor and torch.equal(mask.to("cpu"), MASK)
    kept = pickle.loads(pickle.dumps(mask))
    assert type(kept) is Tensor and kept.device == npu and torch.equal(kept.cpu(), MASK)
    with pytest.raises(RuntimeError):
        X.to(npu).masked_scatter(mask.unsqueeze(-1), SOURCE.to(npu)[:1])
