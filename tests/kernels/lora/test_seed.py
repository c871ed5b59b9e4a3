"""The seeds of masks: from the state of a device's generator, which moves on, and comes back with it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from npu_patch import simulator
from npu_patch.kernels.lora.seed import drawn_seed, mixed, of_one_kind
from npu_patch.kernels.lora.shrink import shrink
from npu_patch.kernels.lora.tiling import MOST
from tests.kernels.exactness import ONE_MACHINE, normal
from tests.kernels.lora.mask_kernel import mask


def test_a_state_that_comes_back_gives_its_seed_again_and_no_state_gives_anothers(npu: torch.device) -> None:
    device = torch.ones(1, device=npu).device
    torch.manual_seed(5)
    states, seeds = [], []
    for _ in range(50):
        states.append(torch.npu.get_rng_state())
        seeds.append(drawn_seed(device))
    assert len(set(seeds)) == 50
    torch.npu.set_rng_state(states[17])
    assert drawn_seed(device) == seeds[17]
    torch.manual_seed(6)
    assert drawn_seed(device) not in seeds


def test_other_operators_draw_what_comes_after_it(npu: torch.device) -> None:
    """It takes as much of the generator as an operator that draws."""
    device = torch.ones(1, device=npu).device
    torch.manual_seed(5)
    torch.rand(1, device=npu)
    expected = torch.rand(8, device=npu)
    torch.manual_seed(5)
    drawn_seed(device)
    assert torch.equal(torch.rand(8, device=npu), expected)


def test_nothing_is_launched(npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    device = torch.ones(1, device=npu).device
    with simulator.count() as counted:
        assert isinstance(drawn_seed(device), int)
    assert counted.launches == 0


def test_where_a_graph_is_captured_the_device_draws(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = torch.npu.default_generators

    def refused() -> int:
        monkeypatch.undo()  # the operator has a way of its own
        raise RuntimeError("Cannot get the offset of a generator while a graph is captured")

    device = torch.ones(1, device=npu).device
    monkeypatch.setattr(torch.npu, "default_generators", (SimpleNamespace(get_offset=refused),))
    seed = drawn_seed(device)
    assert torch.npu.default_generators is genuine
    assert isinstance(seed, torch.Tensor) and seed.device == device and seed.dtype == torch.int64


@ONE_MACHINE
@pytest.mark.usefixtures("machine")
def test_a_seed_in_memory_drops_what_it_drops_as_a_number() -> None:
    x, downs, seed = normal(20, 40), [normal(4, 40, seed=2)] * MOST, of_one_kind(mixed(3, 4))
    assert torch.equal(shrink(x, downs, seed, 0.3), shrink(x, downs, torch.tensor([seed]), 0.3))


def test_seeds_are_of_one_kind_for_compilers() -> None:
    seeds = [of_one_kind(each) for each in (0, 1, 16, 2**64 - 1, *(mixed(1, 4 * step) for step in range(50)))]
    assert all(2**62 <= seed < 2**63 and seed % 2 for seed in seeds)


def test_masks_of_states_that_follow_each_other_are_independent() -> None:
    """Also shifted by some rows, as the offsets are."""
    one, other = (mask(of_one_kind(mixed(0, offset)), 0, 304, 500, 0.5).double() * 2 - 1 for offset in (0, 4))
    for rows in range(0, 9):
        left, right = one[rows:], other[: other.shape[0] - rows]
        assert abs((left * right).sum() / left.numel() ** 0.5) < 5, rows
        assert abs((one[: one.shape[0] - rows] * other[rows:]).sum() / left.numel() ** 0.5) < 5, rows
