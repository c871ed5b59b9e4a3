"""Whether a convolution is that of patches: its forward, with the settings of an instance, on small kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import numbers
from npu_patch.ops.patch_embedding import convolution
from npu_patch.ops.readings import NotRead
from npu_patch.probe.stand_in import Missing, StandIn, problem_text

SETTINGS = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
EMBEDDED, CHANNELS, IMAGES, PATCHES, REST = 3, 2, 2, 2, 1  # REST: pixels beyond the last whole patch


@dataclass(frozen=True)
class Patches:
    """`weight` and `bias` of the instance, the kernels of this shape side by side over the input."""

    kernel: tuple[int, ...]
    name: str = "kernel by kernel"


def settings_of(attributes: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(attributes.get(name) for name in SETTINGS)


@remembered
def read_patches(cls: type, forward: Callable[..., Any], settings: tuple[Any, ...]) -> Patches | NotRead:
    """`forward(self, x)` on a stand-in for an instance of `cls`."""
    attributes = dict(zip(SETTINGS, settings, strict=True))
    kernel = attributes["kernel_size"]
    if type(kernel) is not tuple or len(kernel) not in (2, 3) or all(width == 1 for width in kernel):
        return NotRead("its kernels are no patches")
    with quiet_room():
        for dtype, biased in product((torch.float32, torch.bfloat16), (True, False)):
            observed, expected = _inputs(kernel, dtype, biased), _inputs(kernel, dtype, biased)
            x, weight, bias = observed
            try:
                found = forward(StandIn(cls, {**attributes, "weight": weight, "bias": bias}), x)
            except (Missing, Exception) as problem:
                unless_accident(problem)
                return NotRead(f"its forward does more than a convolution ({problem_text(problem)})")
            tensors = [[each for each in inputs if each is not None] for inputs in (observed, expected)]
            if distance([found], [convolution(*expected)], *tensors) > 1.0:
                return NotRead("it computes no product of whole patches")
    return Patches(kernel)


def _inputs(kernel: tuple[int, ...], dtype: torch.dtype, biased: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    shapes = ((IMAGES, CHANNELS, *(PATCHES * width + REST for width in kernel)), (EMBEDDED, CHANNELS, *kernel))
    x, weight = (numbers(shape, 60 + index, dtype).requires_grad_() for index, shape in enumerate(shapes))
    return x, weight, numbers((EMBEDDED,), 62, dtype).requires_grad_() if biased else None
