"""The catalogue: one module per switch. `apply()` walks `CATALOGUE` in order, which is that of `Patch.needs`; then
`PREPARATIONS` change the given model, those that come first before."""

from npu_patch.patches import add_rms_norm, qk_norm_rope, rms_norm, rope, swiglu
from npu_patch.patches.attention import patch as attention
from npu_patch.patches.experts import patch as experts
from npu_patch.patches.gated_delta import patch as gated_delta_net
from npu_patch.patches.inference import captured_decode, prefetch, static_cache, weight_nz
from npu_patch.patches.inference.continuous_batching import patch as continuous_batching
from npu_patch.patches.inference.mtp import patch as mtp
from npu_patch.patches.lora import patch as lora
from npu_patch.patches.loss import patch as loss
from npu_patch.patches.order import in_order
from npu_patch.patches.patch import Patch
from npu_patch.patches.preparation import Preparation
from npu_patch.patches.vision import approximate_gelu, patch_embedding
from npu_patch.patches.vision import attention as vision_attention
from npu_patch.patches.vision import on_host as vision_on_host
from npu_patch.patches.w8a8 import add_rms_norm as w8a8_add_rms_norm
from npu_patch.patches.w8a8 import compressed
from npu_patch.patches.w8a8 import experts as w8a8_experts
from npu_patch.patches.w8a8 import linear as w8a8
from npu_patch.patches.w8a8 import loading as w8a8_loading
from npu_patch.patches.w8a8 import peft_weights as w8a8_peft

CATALOGUE: tuple[Patch, ...] = in_order(
    (
        rms_norm.PATCH,
        rope.PATCH,
        swiglu.PATCH,
        attention.PATCH,
        vision_attention.PATCH,
        vision_on_host.PATCH,
        approximate_gelu.PATCH,
        experts.PATCH,
        gated_delta_net.PATCH,
        w8a8.PATCH,
        lora.PATCH,
        qk_norm_rope.PATCH,
        add_rms_norm.PATCH,
        w8a8_add_rms_norm.PATCH,
        loss.PATCH,
        patch_embedding.PATCH,
        captured_decode.PATCH,
        static_cache.PATCH,
        continuous_batching.PATCH,
        mtp.PATCH,
        w8a8_loading.PATCH,
        w8a8_experts.PATCH,
        w8a8_peft.PATCH,
    )
)
PREPARATIONS: tuple[Preparation, ...] = (compressed.PREPARATION, weight_nz.PREPARATION, prefetch.PREPARATION)
