"""What this torch_npu has, found by looking: for tests of what another release lacks."""

from __future__ import annotations

import pytest
import torch


def has_operator(name: str) -> bool:
    """Whether the dispatcher knows `npu::name`."""
    return hasattr(torch.ops.npu, name)


def needs_operator(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has_operator(name), reason=f"this torch_npu has no {name}")


def needs_autograd_kernel(name: str) -> pytest.MarkDecorator:
    """Without one torch_npu warns in C++ and leaves the gradients out."""
    found = has_operator(name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1")
    return pytest.mark.skipif(not found, reason=f"this torch_npu's {name} has no autograd kernel")


def sdpa_operator() -> str:
    """The operator that torch_npu's scaled_dot_product_attention ends in."""
    return "npu_fusion_attention_v3" if has_operator("npu_fusion_attention_v3") else "npu_fusion_attention"
