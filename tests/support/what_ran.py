"""Which patches computed something, by the counters of a report."""

from __future__ import annotations

from collections.abc import Iterable

from npu_patch.reporting.outcome import Outcome

# Of patches with several variants, those that a training step goes through: that a mask was left out, or that packing
# was looked for, says nothing of what computes.
COMPUTES = {
    "attention": {"scaled dot-product attention"},
    "gated_delta_net": {"causal convolution", "gated delta rule over chunks"},
}


def why_not_ran(patch: str, outcomes: Iterable[Outcome]) -> str | None:
    """Of a training step: None if every variant of `patch` that computes ran."""
    ran = {outcome.variant for outcome in outcomes if outcome.patch == patch and outcome.calls.ran}
    missed = sorted(COMPUTES.get(patch, set()) - ran)
    if missed:
        return f"the {' and the '.join(missed)} did not run"
    return None if ran else "it did not run"
