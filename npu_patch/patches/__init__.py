"""The catalogue: one module per switch. `apply()` walks `CATALOGUE` in order."""

from npu_patch.patches import add_rms_norm, attention, experts, gated_delta_net, qk_norm_rope, rms_norm, rope, swiglu
from npu_patch.patches.patch import Patch

CATALOGUE: tuple[Patch, ...] = (
    rms_norm.PATCH,
    rope.PATCH,
    swiglu.PATCH,
    attention.PATCH,
    experts.PATCH,
    gated_delta_net.PATCH,
    qk_norm_rope.PATCH,  # after the patches of its two parts
    add_rms_norm.PATCH,  # after that of RMSNorm
)
