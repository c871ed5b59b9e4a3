"""Whether the forward of a class is that of a linear layer with an adapter, and looks at nothing that is not known.

It runs on a stand-in: a base layer and adapters that are plain functions of their weights, two of them, one active. It
has to compute `base(x) + B(A(drop(x))) s` with the active one, forward and backward, and may ask for nothing else. So a
later version that looks at another setting first is left alone, until somebody has looked at that setting.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.probe.stand_in import Missing, StandIn

LINEAR_WITH_ADAPTER = AsNamed("linear with an adapter")
BATCH, WIDTH_IN, WIDTH_OUT, RANK = (2, 3), 8, 6, 4
ACTIVE, OTHER = "one", "other"
SCALING = {ACTIVE: 0.75, OTHER: 3.0}
KEPT = 0.5  # of what the dropout of a stand-in is given, where it drops any
# Of the layer and its input, and of the adapters.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))


@dataclass
class Part:
    """What is called like a linear layer, and has its weight."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@remembered
def read_adapted_linear(cls: type, forward: Callable[..., Any]) -> AsNamed | NotRead:
    """Runs `forward(self, x)` on stand-ins for instances of `cls`."""
    with quiet_room():
        for dtypes, drops, training in product(DTYPES, (False, True), (False, True)):
            for autocast in (False, True):
                found = _why_not(cls, forward, dtypes, drops, training, autocast)
                if found is not None:
                    return NotRead(found, notable=False)
    return LINEAR_WITH_ADAPTER


def _why_not(
    cls: type,
    forward: Callable[..., Any],
    dtypes: tuple[torch.dtype, torch.dtype],
    drops: bool,
    training: bool,
    autocast: bool,
) -> str | None:
    around: AbstractContextManager[Any] = torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext()
    mine, others = _Layer.of(*dtypes, drops), _Layer.of(*dtypes, drops)
    try:
        with around:
            observed = forward(StandIn(cls, mine.attributes(training)), mine.x)
            expected = others.result()
        far = distance([observed], [expected], mine.differentiated, others.differentiated)
    except Missing as missing:
        return f"it asks for {missing.name!r}"
    except Exception as error:
        unless_accident(error)
        return error_text(error)
    return None if far <= 1.0 else "it computes something else than base(x) + B(A(drop(x))) s"


@dataclass
class _Layer:
    x: Tensor
    base: Part
    down: dict[str, Part]
    up: dict[str, Part]
    drops: bool

    @classmethod
    def of(cls, dtype: torch.dtype, adapter_dtype: torch.dtype, drops: bool) -> _Layer:
        def part(shape: tuple[int, int], seed: int) -> Part:
            return Part(values(shape, seed, adapter_dtype, grad=True))

        return cls(
            values((*BATCH, WIDTH_IN), 1, dtype, grad=True),
            Part(values((WIDTH_OUT, WIDTH_IN), 2, dtype), values((WIDTH_OUT,), 3, dtype)),
            {name: part((RANK, WIDTH_IN), 4 + index) for index, name in enumerate(SCALING)},
            {name: part((WIDTH_OUT, RANK), 6 + index) for index, name in enumerate(SCALING)},
            drops,
        )

    @property
    def differentiated(self) -> list[Tensor]:
        return [self.x, self.down[ACTIVE].weight, self.up[ACTIVE].weight]

    def dropped(self, x: Tensor) -> Tensor:
        return x * (values(x.shape, 8) > 0).to(x.dtype) / KEPT if self.drops else x

    def attributes(self, training: bool) -> dict[str, Any]:
        """All that `patches/lora/patch.py` looks at in each call."""
        return {
            "base_layer": self.base,
            "lora_A": self.down,
            "lora_B": self.up,
            "lora_dropout": dict.fromkeys(SCALING, self.dropped),
            "scaling": SCALING,
            "lora_variant": {},
            "use_dora": dict.fromkeys(SCALING, False),
            "merged_adapters": [],
            "_active_adapter": ACTIVE,
            "_disable_adapters": False,
            "cast_input_dtype_enabled": True,
            "training": training,
        }

    def result(self) -> Tensor:
        result = self.base(self.x)
        shrunk = self.down[ACTIVE](self.dropped(self.x.to(self.down[ACTIVE].weight.dtype)))
        return (result + self.up[ACTIVE](shrunk) * SCALING[ACTIVE]).to(result.dtype)
