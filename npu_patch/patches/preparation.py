"""What a preparation is made of: it changes a model, where a patch replaces a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from npu_patch.switches import Switches

# A layer that was changed, and what changes it back. It is called with the layer, which it must not hold itself: a
# model that nobody else holds is freed, and then there is nothing to put back. Of a process's setting it is the same.
Change = tuple[Any, Callable[[Any], None]]


@dataclass(frozen=True)
class Rebinding:
    """What a changed layer needs besides: `name` in the namespace of `owner` made `new`, by the journal, once."""

    owner: Any
    name: Any
    new: Callable[..., Any]


@dataclass(frozen=True)
class LeftAlone:
    """What of the model was not changed, in words."""

    why: str


@dataclass(frozen=True)
class Preparation:
    """One entry of `PREPARATIONS`: another format of weights, a captured graph, quantised layers.

    `why_not(model, device_type, switches)`: the reason to leave the model alone, or None; it only looks, for a dry run
    asks too. `prepare`, given the same, changes one layer after the other and yields each `Change` as soon as it is
    made: where one fails, those before it are undone. A `Rebinding` is made as it is yielded. `switch`: its name in
    `SWITCHES`. `concerns(model)`, if not every model does: whether it has what is prepared; of others nothing is said.
    `first`: before the patches look at the model, which find other layers in it then.
    """

    name: str
    switch: str
    why_not: Callable[[torch.nn.Module, str, Switches], str | None]
    prepare: Callable[[torch.nn.Module, str, Switches], Iterator[Change | Rebinding | LeftAlone]]
    concerns: Callable[[torch.nn.Module], bool] | None = None
    first: bool = False
