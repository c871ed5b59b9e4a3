"""Models whose ops run as Triton kernels on the simulated NPU (in triton's interpreter) compute what they did."""

from __future__ import annotations

import math
import statistics
from collections import Counter

import pytest
import torch

import npu_patch
from npu_patch import simulator
from npu_patch.kernels import launch
from npu_patch.kernels.readiness import why_not
from npu_patch.ops.rms_norm import GATED_VARIANTS, PLAIN_VARIANTS, unsupported_by_triton
from tests.support.gradients import in_float64, loss_and_gradients, relative_error, token_losses
from tests.support.tiny_models import tiny, tiny_batch

WHY_NOT = why_not() if simulator.is_active() else "the models here are for the interpreter on the simulated NPU"
needs_triton = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
SERVED = {family: {"rms_norm", "swiglu", "qk_norm_rope", "add_rms_norm"} for family in ("qwen3", "qwen3_5")}


pytestmark = pytest.mark.usefixtures("two_cores")


def ran_triton(report: npu_patch.Report) -> set[str]:
    return {outcome.patch for outcome in report.patched if outcome.calls.ran_by["triton"]}


@needs_triton
@pytest.mark.parametrize("family", SERVED)
def test_loss_and_every_gradient_in_float32(family: str, npu: torch.device) -> None:
    """To the bar of tests/training/test_parity.py."""
    model, batch = tiny(family), tiny_batch(length=5)
    exact = loss_and_gradients(in_float64(model), batch)
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
    assert patched.keys() == original.keys()
    for name in original:
        error = relative_error(patched[name], original[name])
        if error >= 1e-6:
            assert relative_error(patched[name], exact[name]) < 5 * relative_error(original[name], exact[name]), name


@needs_triton
def test_rows_that_do_not_fit_on_chip_are_left_to_torch_npu(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a chip with room for 40 elements of a residual stream of 48: its norms alone, not those of heads."""
    from npu_patch.kernels import add_rms_norm

    machine = launch.Machine("npu", 2, 40 * add_rms_norm.BACKWARD.least_bytes, exact_widths=True)
    monkeypatch.setattr(launch, "machine_of", lambda device: machine)
    model, batch = tiny("qwen3").to(npu), tiny_batch(length=5)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert ran_triton(report) == {"swiglu", "qk_norm_rope"}
    (norms,) = [outcome for outcome in report.patched if outcome.patch == "rms_norm" and outcome.layers]
    assert set(norms.calls.ran_by) == {"torch_npu.npu_rms_norm"} and not norms.calls.fell_through
    assert norms.as_dict()["declined"]["triton"] == "48 wide: 40 is the most that fits on chip"
    assert all(relative_error(patched[name], original[name]) < 1e-5 for name in original)


@needs_triton
@pytest.mark.parametrize("gated", [False, True])
def test_the_widest_row_that_fits_is_taken(gated: bool, npu: torch.device) -> None:
    from npu_patch.kernels import add_rms_norm, gated_rms_norm

    tiles = gated_rms_norm.TILES if gated else add_rms_norm.TILES
    widest = launch.widest_row(launch.machine_of(npu), *tiles)
    assert 4096 < widest < 16384  # which the compiler refuses
    variant = (GATED_VARIANTS if gated else PLAIN_VARIANTS)[0]
    for width, reason in ((widest, None), (widest + 1, f"{widest + 1} wide: {widest} is the most that fits on chip")):
        x, weight = torch.ones(1, width, device=npu), torch.ones(width, device=npu)
        assert unsupported_by_triton(variant, x, weight, 1e-6, x if gated else None) == reason


@needs_triton
@pytest.mark.parametrize("family", SERVED)
def test_bfloat16_is_no_further_from_float64_than_the_original(family: str, npu: torch.device) -> None:
    """As in tests/training/test_parity.py, over fewer models."""
    loss_errors = {False: 0.0, True: 0.0}
    ratios: list[float] = []
    for seed in range(4):
        model = tiny(family, seed=seed).bfloat16()
        batch = tiny_batch(length=7, seed=seed)
        exact_model = in_float64(model)
        exact = loss_and_gradients(exact_model, batch)
        exact_losses = token_losses(exact_model, batch["input_ids"])
        model = model.to(npu)
        errors: dict[bool, list[float]] = {}
        for patch in (False, True):
            with npu_patch.applied(model, patch=patch, triton=True) as report:
                found = loss_and_gradients(model, batch)
                losses = token_losses(model, batch["input_ids"])
            assert ran_triton(report) == (SERVED[family] if patch else set())
            loss_errors[patch] += float((losses - exact_losses).square().sum())
            errors[patch] = [relative_error(found[name], exact[name]) for name in exact if exact[name].any()]
        ratios += [one / other for one, other in zip(errors[True], errors[False], strict=True) if other > 0]
    assert math.sqrt(loss_errors[True] / loss_errors[False]) < 1.1
    assert statistics.geometric_mean(ratios) < 1.1
