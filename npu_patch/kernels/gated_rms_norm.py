"""RMSNorm whose result is multiplied by an activation of a gate, as tiled for heads of gated delta nets.

For a head of D elements the forward moves 3 D and the backward 5 D. Source of the formula: Mamba 2
(https://arxiv.org/abs/2405.21060), as the gated delta nets of qwen3_next and qwen3_5 use it.
"""

from __future__ import annotations

from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.gamma import ACTIVATIONS, WEIGHT, Gamma
from npu_patch.kernels.rms_norm import RMSNorm

FORWARD = launch.Tile(bytes_per_element=32, elements=4096, least_bytes=19)
BACKWARD = launch.Tile(bytes_per_element=48, elements=4096, least_bytes=35)
TILES = (FORWARD, BACKWARD)


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor | None, eps: float, activation: str = "silu", gamma: Gamma = WEIGHT
) -> Tensor:
    """RMSNorm(x) * activation(gate) for x and gate `[..., D]` and weight `[D]`, in the dtype of x.

    `activation` is a name of `ACTIVATIONS`, `gamma` has a kernel, `eps` is positive.
    """
    return RMSNorm.apply(x, None, gate, weight, eps, gamma, ACTIVATIONS[activation], (FORWARD, BACKWARD))[0]
