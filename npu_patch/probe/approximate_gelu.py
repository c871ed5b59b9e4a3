"""Which approximation of GELU a module without parts computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.approximate_gelu import APPROXIMATIONS, Approximation
from npu_patch.ops.readings import NotRead
from npu_patch.probe.stand_in import Missing, StandIn, problem_text

SHAPE = (3, 5, 8)


def read_gelu(cls: type, forward: Callable[..., Any]) -> Approximation | NotRead:
    with quiet_room():
        apart = dict.fromkeys(APPROXIMATIONS, 0.0)
        for dtype, scale in ((torch.float32, 1.0), (torch.float32, 4.0), (torch.bfloat16, 1.0)):
            for approximation in apart:
                x, expected_x = ((values(SHAPE, 30) * scale).to(dtype).requires_grad_() for _ in range(2))
                try:
                    observed = forward(StandIn(cls, {"training": True}), x)
                except (Missing, Exception) as problem:
                    unless_accident(problem)
                    return NotRead(f"it is no function of its input alone ({problem_text(problem)})", notable=False)
                expected = approximation.reference(expected_x.float()).to(dtype)
                far = distance([observed], [expected], [x], [expected_x])
                apart[approximation] = max(apart[approximation], far)
        nearest = min(apart, key=apart.__getitem__)
        return nearest if apart[nearest] <= 1.0 else NotRead("it computes no approximation of GELU", notable=False)
