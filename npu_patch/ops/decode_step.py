"""One step of decoding, captured and replayed: not a computation of its own, but how a model's is launched."""

from __future__ import annotations

from npu_patch.serving.op import of_no_computation

DECODE_STEP = of_no_computation("decode step", "graph", ("npu", "cuda"))
