"""Launches that differ in their tensors alone go straight to what triton compiled, with what they are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from npu_patch.kernels import launch
from tests.kernels.test_launch import FakeKernel

ALIGNED, OTHER, UNALIGNED = torch.ones(8), torch.ones(8), torch.ones(9)[1:]


def planned(kernel: FakeKernel, rows: int = 5, grid: int = 3) -> launch.Planned:
    return launch.Planned(kernel, torch.device("cpu"), grid, (rows, 1e-6), num_warps=4, STAGES=2, BLOCK=8)


@pytest.mark.parametrize("passes_constants", [True, False])
def test_a_second_launch_goes_to_what_was_compiled(passes_constants: bool) -> None:
    kernel = FakeKernel(passes_constants)
    again = planned(kernel)
    again((ALIGNED, None))
    again((OTHER, None))
    constants = (8, 2) if passes_constants else ()
    assert kernel.compiled == 1
    ((grid, (x, absent, *rest)),) = kernel.launched
    assert x is OTHER and absent is None
    assert (grid, rest) == (3, [5, 1e-6, *constants])


def test_two_of_one_kind_compile_once_and_each_has_its_own_scalars_and_grid() -> None:
    kernel = FakeKernel(True)
    one, two = planned(kernel), planned(kernel, 7, 4)
    for each in (one, two, two, one):
        each((ALIGNED, None))
    assert kernel.compiled == 1
    assert [(grid, arguments[2]) for grid, arguments in kernel.launched] == [(4, 7), (4, 7), (3, 5)]


def test_the_seed_comes_between_tensors_and_scalars() -> None:
    kernel = FakeKernel(True)
    again = launch.Planned(kernel, torch.device("cpu"), 3, (5, 1e-6), STAGES=2, BLOCK=8)
    for seed in (3, 9):
        again((ALIGNED,), seed)
    ((_, arguments),) = kernel.launched
    assert arguments[1:] == (9, 5, 1e-6, 8, 2)


@pytest.mark.parametrize("first", ["aligned", "not"])
def test_memory_that_is_not_aligned_is_compiled_for_on_its_own(first: str) -> None:
    kernel = FakeKernel(True)
    again = planned(kernel)
    tensors = (ALIGNED, UNALIGNED) if first == "aligned" else (UNALIGNED, ALIGNED)
    for tensor in tensors:
        again((tensor, None))
    assert (kernel.compiled, kernel.launched) == (2, [])
    for tensor in tensors:
        again((tensor, None))
    assert kernel.compiled == 2
    assert [arguments[0] is tensor for (_, arguments), tensor in zip(kernel.launched, tensors, strict=True)] == [
        True
    ] * 2


def test_the_runner_of_a_device_is_asked_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, seen = FakeKernel(True), []

    def runner(kernel: Any, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        seen.append((grid, arguments[2:], constants))

    again = planned(kernel)
    again((ALIGNED, None))
    monkeypatch.setitem(launch.RUNNERS, "cpu", runner)
    again((ALIGNED, None))
    assert seen == [(3, (5, 1e-6), {"STAGES": 2, "BLOCK": 8})] and not kernel.launched
