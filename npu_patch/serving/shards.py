"""Tensors of which each rank has a part (DTensor), where what is computed of a row needs nothing of another row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_sharded(x: Any) -> bool:
    """By name: torch.distributed.tensor is not imported for it."""
    return type(x).__name__ == "DTensor"


def own_rows(x: Any, weight: Any) -> tuple[Tensor, Tensor | None] | None:
    """This rank's rows of `x`, and the weight of its last dimension, whose gradient is a part of the sum over the
    ranks that have other rows. None where rows are in parts, or the weight is."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    whole_rows = all(
        isinstance(each, Replicate) or (isinstance(each, Shard) and each.dim % x.dim() != x.dim() - 1)
        for each in x.placements
    )
    if not whole_rows:
        return None
    if weight is None:
        return x.to_local(), None
    replicated = isinstance(weight, DTensor) and all(isinstance(each, Replicate) for each in weight.placements)
    if not replicated or weight.device_mesh != x.device_mesh:
        return None
    of_weight = [Partial() if isinstance(each, Shard) else Replicate() for each in x.placements]
    return x.to_local(), weight.to_local(grad_placements=of_weight)


def like(own: Tensor, x: Any) -> Tensor:
    """The tensor of which each rank has its part, as it has of `x`, of the same shape."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(x.shape, device="meta").stride()
    return DTensor.from_local(own, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=stride)
