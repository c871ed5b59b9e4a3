"""The operators of torch_npu's own namespace (`torch.ops.npu.*`), each as its documentation describes it."""

import torch

from .. import wrong
from ..overriding import override
from . import (
    adam_w,
    attention,
    attention_inference,
    attention_inference_out,
    attention_v2,
    companions,
    cross_entropy,
    dequant_swiglu_quant,
    dropout,
    dynamic_quant,
    gated_delta_rule,
    group_norm,
    grouped_matmul,
    moe_permute,
    moe_routing,
    moe_routing_map,
    paged_cache,
    quant_matmul,
    ring_attention,
    rms_norm,
    rotary,
    rotary_in_place,
    scaled_softmax,
    swiglu,
)
from .kernel import is_declared, npu_kernel

FAMILIES = (
    rms_norm,
    group_norm,
    rotary,
    rotary_in_place,
    swiglu,
    attention,
    attention_v2,
    attention_inference,
    attention_inference_out,
    paged_cache,
    ring_attention,
    grouped_matmul,
    dynamic_quant,
    quant_matmul,
    dequant_swiglu_quant,
    moe_permute,
    moe_routing,
    moe_routing_map,
    gated_delta_rule,
    dropout,
    scaled_softmax,
    cross_entropy,
    adam_w,
    companions,
)

_libraries: list[torch.library.Library] = []  # registrations end with the library object


def register() -> None:
    """Register the leaf kernels only: torch_npu's own derivatives and autograd fallbacks stay in effect above them.

    torch_npu's kernels stay for every other operator. Those that are compositions of others work; those that would
    launch a kernel of their own fail and name it ("aclnnX ... not in libopapi.so", or "OPS function error: X").
    """
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for family in FAMILIES:
        for name, kernel in family.KERNELS.items():
            if not is_declared(name):  # by this version of torch_npu
                continue
            override(library, name, npu_kernel(name, kernel), "PrivateUse1")
        wrong.SIMULATED.update(family.KERNELS)
