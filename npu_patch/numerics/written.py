"""Whether somebody wrote to a tensor, as far as torch counts it."""

from __future__ import annotations

from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """How often it was written to; None where nobody counts, in inference mode."""
    return None if tensor.is_inference() else tensor._version
