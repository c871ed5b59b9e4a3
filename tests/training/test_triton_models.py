"""Models whose ops run as Triton kernels on the simulated NPU (in triton's interpreter) compute what they did."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

import npu_patch
from npu_patch.kernels import launch
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS, unsupported_by_triton
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.needs_triton import needs_triton
from tests.support.parity import assert_no_further_from_float64, why_unequal
from tests.support.tiny_models import tiny, tiny_batch

SERVED = {
    family: {"rms_norm", "swiglu", "qk_norm_rope", "add_rms_norm", "cross_entropy"} for family in ("qwen3", "qwen3_5")
}


pytestmark = pytest.mark.usefixtures("two_cores")


def ran_triton(report: npu_patch.Report) -> set[str]:
    return {outcome.patch for outcome in report.patched if outcome.calls.ran_by["triton"]}


@needs_triton
@pytest.mark.parametrize("family", SERVED)
def test_loss_and_every_gradient_in_float32(family: str, npu: torch.device) -> None:
    model, batch = tiny(family), tiny_batch(length=5)
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert not report.failed
    assert ran_triton(report) == SERVED[family]
    ran_by = sum(
        (outcome.calls.ran_by for outcome in report.patched if outcome.patch in SERVED[family]), start=Counter()
    )
    assert set(ran_by) == {"triton"}
    assert why_unequal(on_cpu, batch, original, patched) is None


@needs_triton
def test_rows_that_do_not_fit_on_chip_are_left_to_torch_npu(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip with room for 40 elements of a residual stream of 48: its norms alone, not those of heads."""
    from npu_patch.kernels import rms_norm

    machine = launch.Machine("npu", 2, 40 * rms_norm.BACKWARD.least_bytes, exact_widths=True)
    monkeypatch.setattr(launch, "machine_of", lambda device: machine)
    model, batch = tiny("qwen3").to(npu), tiny_batch(length=5)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert ran_triton(report) == {"swiglu", "qk_norm_rope", "cross_entropy"}
    (norms,) = [outcome for outcome in report.patched if outcome.patch == "rms_norm" and outcome.layers]
    assert set(norms.calls.ran_by) == {"torch_npu.npu_rms_norm"} and not norms.calls.fell_through
    assert norms.as_dict()["declined"]["triton"] == "48 wide: 40 is the most that fits on chip"
    assert all(relative_error(patched[name], original[name]) < 1e-5 for name in original)


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
def test_the_widest_row_that_fits_is_taken(gated: bool, npu: torch.device) -> None:
    from npu_patch.kernels import gated_rms_norm, rms_norm

    tiles = gated_rms_norm.TILES if gated else rms_norm.TILES
    widest = launch.widest_row(launch.machine_of(npu), *tiles)
    assert 4096 < widest < 16384  # which the compiler refuses
    variant = (GATED_VARIANTS if gated else PLAIN_VARIANTS)[0]
    for width, reason in ((widest, None), (widest + 1, f"{widest + 1} wide: {widest} is the most that fits on chip")):
        x, weight = torch.ones(1, width, device=npu), torch.ones(width, device=npu)
        assert unsupported_by_triton(variant, x, weight, 1e-6, x if gated else None) == reason


@needs_triton
@pytest.mark.parametrize("family", SERVED)
def test_bfloat16_is_no_further_from_float64_than_the_original(family: str, npu: torch.device) -> None:
    def check(report: npu_patch.Report, patched: bool) -> None:
        assert ran_triton(report) == (SERVED[family] if patched else set())

    models = ((tiny(family, seed=seed).bfloat16(), tiny_batch(length=7, seed=seed)) for seed in range(4))
    assert_no_further_from_float64(models, npu, check, triton=True)
