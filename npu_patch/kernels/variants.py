"""What the kernels of norms compute, by the names of `ops.rms_norm`. Needs no triton."""

from __future__ import annotations

GAMMAS = {"none": 0, "weight": 1, "1 + weight": 2, "rounded 1 + weight": 3}
ACTIVATIONS = {"sigmoid": 0, "silu": 1}
