"""What to check of a loss on a device: the vocabularies of the given model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from npu_patch.ops.token_losses import case
from npu_patch.serving.case import Case
from npu_patch.sites.sites import LiveModules


def cases(live: LiveModules) -> Iterator[Case]:
    vocabularies = {weight.shape[0] for module in live if (weight := _head_weight(module)) is not None}
    for vocabulary in vocabularies:
        yield case(vocabulary)


def _head_weight(module: torch.nn.Module) -> Tensor | None:
    embeddings = getattr(module, "get_output_embeddings", None)
    weight = getattr(embeddings(), "weight", None) if callable(embeddings) else None
    return weight if isinstance(weight, Tensor) and weight.dim() == 2 else None
