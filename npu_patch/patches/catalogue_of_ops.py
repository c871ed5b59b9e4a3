"""Every op that a patch uses, with its implementations in order of preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from npu_patch.ops.gated_delta.op import CONVOLUTION_PROVIDERS, UPDATE_PROVIDERS
from npu_patch.patches import CATALOGUE
from npu_patch.serving.implementation import Implementation

OPS: Mapping[str, Sequence[Implementation]] = {
    **{patch.name: patch.implementations for patch in CATALOGUE},
    "causal_conv1d": CONVOLUTION_PROVIDERS,
    "causal_conv1d_update": UPDATE_PROVIDERS,
}
