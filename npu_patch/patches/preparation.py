"""What a preparation is made of: it changes a model, where a patch replaces a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from npu_patch.switches import Switches

# A layer that was changed, and what changes it back. It is called with the layer, which it must not hold itself: a
# model that nobody else holds is freed, and then there is nothing to put back.
Change = tuple[torch.nn.Module, Callable[[torch.nn.Module], None]]


@dataclass(frozen=True)
class Preparation:
    """One entry of `PREPARATIONS`: another format of weights, a captured graph, quantised layers.

    `why_not(model, device_type, switches)`: the reason to leave the model alone, or None; it only looks, for a dry run
    asks too. `prepare`, given the same, changes one layer after the other and yields each `Change` as soon as it is
    made: where one fails, those before it are undone. `switch`: its name in `SWITCHES`.
    """

    name: str
    switch: str
    why_not: Callable[[torch.nn.Module, str, Switches], str | None]
    prepare: Callable[[torch.nn.Module, str, Switches], Iterator[Change]]
