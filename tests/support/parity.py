"""How far results may be from each other and from float64. The measure and the bars are those of `verify`, so that each
is written once: npu_patch/commands/replay/bars.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

import npu_patch
from npu_patch.commands.replay.bars import FLOORS, GROSS, RATIO, relative_error
from tests.support.gradients import in_float64, loss_and_gradients, token_losses

NEAR = FLOORS[torch.float32]
ZERO = 1e-10  # of the largest result's norm
Results = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


def apart(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of what is not within NEAR; infinite for what only one of the two has."""
    errors = {
        name: relative_error(found[name], expected[name]) if name in found and name in expected else math.inf
        for name in found.keys() | expected.keys()
    }
    return {name: error for name, error in sorted(errors.items()) if error >= NEAR}


def why_unequal(
    model: nn.Module,
    batch: dict[str, Tensor],
    original: dict[str, Tensor],
    patched: dict[str, Tensor],
    results: Results = loss_and_gradients,
) -> str | None:
    """The first of `patched` that is further than NEAR from `original` and from float64 more than GROSS times as far.

    model: on the CPU, for float64. The second clause is for what float32 cannot tell so well: dt_bias and A_log of the
    gated delta rule are small differences of large numbers, unpatched up to 1e-4 off. One such number may be lucky;
    tests/training/test_parity.py compares them on average. Of what is zero, as the gradient of a bias of k without
    RoPE, either has its roundings alone: they are measured by the largest result.
    """
    if patched.keys() != original.keys():
        return f"gradients of {sorted(patched.keys() ^ original.keys())[:3]}"
    names = apart(patched, original)
    exact = results(in_float64(model), batch) if names else {}
    largest = max((float(x.norm()) for x in exact.values()), default=0.0)
    for name in names:
        if float(exact[name].norm()) < ZERO * largest:
            if not float(patched[name].norm()) < NEAR * largest:
                return f"{name} is {float(patched[name].norm()):.1e}, not zero"
            continue
        error, own = (relative_error(found[name], exact[name]) for found in (patched, original))
        if not error < GROSS * own:
            return f"{name} is {error:.1e} from float64, the original {own:.1e}"
    return None


def ratios(found: Mapping[str, Tensor], own: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> list[float]:
    """Of each result, how many times as far from float64 as the original it is."""
    return [relative_error(found[name], exact[name]) / relative_error(own[name], exact[name]) for name in exact]


def assert_no_further_from_float64(
    models: Iterable[tuple[nn.Module, dict[str, Tensor]]],
    device: torch.device,
    check: Callable[[npu_patch.Report, bool], None] = lambda report, patched: None,
    losses_of: Callable[[nn.Module, dict[str, Tensor]], Tensor] = token_losses,
    **switches: bool,
) -> None:
    """At most RATIO times: the tokens' losses (root mean square), the gradients (geometric mean of each one's ratio).

    Over several models, each with its batch: in one model the roundings of a few small weights decide, and either may
    be lucky (0.6 to 1.5 was seen). The geometric mean lets no single ill-conditioned gradient decide.

    check: of the report of each run, and whether that was patched. losses_of: the tokens' losses.
    """
    loss_errors = {False: 0.0, True: 0.0}
    all_ratios: list[float] = []
    for model, batch in models:
        exact_model = in_float64(model)
        exact, exact_losses = loss_and_gradients(exact_model, batch), losses_of(exact_model, batch)
        model = model.to(device)
        found: dict[bool, dict[str, Tensor]] = {}
        for patch in (False, True):
            with npu_patch.applied(model, patch=patch, **switches) as report:
                found[patch] = loss_and_gradients(model, batch)
                losses = losses_of(model, batch)
            check(report, patch)
            loss_errors[patch] += float((losses - exact_losses).square().sum())
        rounded = {name: x for name, x in exact.items() if x.any() and relative_error(found[False][name], x) > 0}
        all_ratios += ratios(found[True], found[False], rounded)
    assert math.sqrt(loss_errors[True] / loss_errors[False]) < RATIO
    assert statistics.geometric_mean(all_ratios) < RATIO
