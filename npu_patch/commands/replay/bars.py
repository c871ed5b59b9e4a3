"""How near is near enough: the bars of `verify`, for one op and for a whole model.

float32: within 1e-6 of float64, relative (norm of the difference over norm of the truth). A result that the original
misses by more (differences of large numbers) is within `GROSS` times the original's error: there either may be lucky.
16-bit dtypes: no further from float64 than `RATIO` times what the original is, as the geometric mean over the results;
and no single one further than `GROSS` times.
A result that the dtype rounds cannot be told better than its own rounding: nothing is held to less than `FLOORS`. Where
the original itself is further off than `UNLIKE`, what was compared with is no reference, and nothing is shown.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RATIO = 1.1
GROSS = 5.0
UNLIKE = 0.3
FLOORS = {torch.float32: 1e-6, torch.bfloat16: 2.0**-10, torch.float16: 2.0**-13}


@dataclass(frozen=True)
class Error:
    """Of one result: how far the replacement and the original are from float64, relative."""

    name: str
    replaced: float
    original: float

    def ratio(self, floor: float) -> float:
        return max(self.replaced, floor) / max(self.original, floor)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Infinite for another shape and for NaN where there is none."""
    if actual.shape != expected.shape:
        return math.inf
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
    return math.inf if math.isnan(error) else error


def worst(errors: Sequence[Error], dtype: torch.dtype) -> Error:
    """Of at least one."""
    return max(errors, key=lambda error: error.ratio(FLOORS[dtype]))


def why_not(errors: Sequence[Error], dtype: torch.dtype) -> str | None:
    """What misses the bar, where and by how much; or None."""
    if not errors:
        return "nothing to compare"
    floor = FLOORS[dtype]
    unlike = max(errors, key=lambda error: error.original)
    if unlike.original > UNLIKE:
        return f"cannot be judged: {unlike.name} of the original itself is {unlike.original:.2e} from float64"
    far = worst(errors, dtype)
    exact = dtype == torch.float32 and far.original <= floor
    limit = floor if exact else GROSS * max(far.original, floor)
    if far.replaced > limit:
        return (
            f"{far.name} is {far.replaced:.2e} from float64, the original {far.original:.2e}; accepted is {limit:.2e}"
        )
    if dtype == torch.float32:
        return None
    mean = statistics.geometric_mean(error.ratio(floor) for error in errors)
    if mean > RATIO:
        return (
            f"{mean:.3f} times as far from float64 as the original over {len(errors)} results; accepted is {RATIO}; "
            f"worst: {far.name}, {far.replaced:.2e} for {far.original:.2e}"
        )
    return None
