"""Tokens taken back from a cache: not a computation of its own, but what a model's steps keep for it."""

from __future__ import annotations

from npu_patch import devices
from npu_patch.serving.op import of_no_computation

ROLLBACK = of_no_computation("rollback", "kept states", devices.TYPES)
