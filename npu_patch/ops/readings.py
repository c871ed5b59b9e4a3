"""What probes read of an original: which variant of an op it computes and how it is called, or why not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from npu_patch.ops.rms_norm import RMSNormVariant
from npu_patch.ops.rope import RoPEVariant


@dataclass(frozen=True)
class NotRead:
    """Why a site is left alone. Not `notable`: it has nothing to do with this patch, and the report stays silent.
    `in_order`: as it should be, so that a patch which leaves all its sites for that does not warn."""

    reason: str
    notable: bool = True
    in_order: bool = False

    def notable_if(self, notable: bool) -> NotRead:
        return replace(self, notable=notable)


@dataclass(frozen=True)
class AsNamed:
    """It computes what its name says, and there is nothing else to be known of it."""

    name: str


@dataclass(frozen=True)
class RMSNormReading:
    """The forward computes `variant`, with these attributes, as long as `configuration` holds."""

    variant: RMSNormVariant
    weight_name: str | None
    eps_name: str
    configuration: Mapping[str, Any]


@dataclass(frozen=True)
class Signature:
    """The function's parameters: `tensors` to rotate come first; `dimension` is where the tables get their heads."""

    names: tuple[str, ...]
    tensors: tuple[str, ...]
    dimension: str | None
    default_dimension: int
    sections: str | None
    positions: str | None


@dataclass(frozen=True)
class RoPEReading:
    """The function computes `variant`, of heads whose last dimensions pass through only if `partial`.

    `unsqueeze_dim` is where the tables get their head dimension, if the function has no parameter for it, or None if
    the tables already have one.
    """

    variant: RoPEVariant
    signature: Signature
    unsqueeze_dim: int | None
    partial: bool
