"""The gates of the kernels of norms, by the names of `ops.rms_norm`. Needs no triton."""

from __future__ import annotations

ACTIVATIONS = {"sigmoid": 0, "silu": 1}
