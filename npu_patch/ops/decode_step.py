"""One step of decoding, captured and replayed: not a computation of its own, but how a model's is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npu_patch.serving.implementation import Implementation
from npu_patch.serving.op import Op

DECODE_STEP: Op[[Callable[[], Any]], Any] = Op(
    "decode step",
    (Implementation("graph", ("npu", "cuda"), lambda step: step(), lambda step: None),),
    lambda step: (),
    lambda step: step(),
)
