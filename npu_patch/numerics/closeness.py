"""How far an original is from a variant's formula: outputs and gradients, in units of the dtype's tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.values import values

# How far a result may be from the variant's own formula, relative to the largest element. bfloat16 has 8 significant
# bits: two formulas that round in another order differ by one unit in the last place, 2**-7 at the most.
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


def difference(observed: Any, expected: Tensor) -> float:
    """The largest difference relative to the largest expected element; infinite where shape, dtype or kind differ."""
    if not isinstance(observed, Tensor) or observed.shape != expected.shape or observed.dtype != expected.dtype:
        return float("inf")
    observed64, expected64 = observed.detach().double(), expected.detach().double()
    scale = float(expected64.abs().max()) if expected64.numel() else 1.0
    distance = float((observed64 - expected64).abs().max()) if expected64.numel() else 0.0
    if distance != distance:  # NaN
        return float("inf")
    return distance / (scale or 1.0)


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of `inputs` for fixed random gradients of `outputs`."""
    if not any(output.requires_grad for output in outputs):
        return [None] * len(inputs)
    seeds = [values(output.shape, 90 + index, output.dtype) for index, output in enumerate(outputs)]
    return list(torch.autograd.grad(list(outputs), list(inputs), seeds, retain_graph=True, allow_unused=True))


def distance(
    observed: Sequence[Any], expected: Sequence[Tensor], inputs: Sequence[Tensor], expected_inputs: Sequence[Tensor]
) -> float:
    """The largest of the differences of all outputs and of all input gradients, in units of the dtype's tolerance.

    At most 1.0 means that the original was observed to compute the variant on these inputs, forward and backward.
    """
    if len(observed) != len(expected):
        return float("inf")
    worst = max(difference(one, other) / TOLERANCES[other.dtype] for one, other in zip(observed, expected, strict=True))
    if worst > 1.0:
        return worst
    pairs = zip(gradients(observed, inputs), gradients(expected, expected_inputs), strict=True)
    for one, other in pairs:
        if (one is None) != (other is None):
            return float("inf")
        if other is not None:
            # A bfloat16 gradient passes through several roundings of the original's intermediate results.
            allowed = TOLERANCES[other.dtype] * (1.0 if other.dtype == torch.float32 else 4.0)
            worst = max(worst, difference(one, other) / allowed)
    return worst
