"""Tokens taken back from a cache: not a computation of its own, but what a model's steps keep for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npu_patch import devices
from npu_patch.serving.implementation import Implementation
from npu_patch.serving.op import Op

ROLLBACK: Op[[Callable[[], Any]], Any] = Op(
    "rollback",
    (Implementation("kept states", devices.TYPES, lambda step: step(), lambda step: None),),
    lambda step: (),
    lambda step: step(),
)
