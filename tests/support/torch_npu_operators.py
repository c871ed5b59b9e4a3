"""What this torch_npu has, found by looking: for tests of what another release lacks."""

from __future__ import annotations

import importlib.util

import pytest
import torch


def has_operator(name: str) -> bool:
    """Whether the dispatcher knows `npu::name`."""
    return hasattr(torch.ops.npu, name)


def needs_operator(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not has_operator(name), reason=f"this torch_npu has no {name}")


def needs_argument(name: str, argument: str) -> pytest.MarkDecorator:
    found = has_operator(name) and argument in str(getattr(torch.ops.npu, name).default._schema)
    return pytest.mark.skipif(not found, reason=f"this torch_npu has no {name} with {argument}")


# Before it had handlers of operators, its allocator took a capture that failed for one under way, for ever.
ends_failed_captures = pytest.mark.skipif(
    importlib.util.find_spec("torch_npu.npu._npugraph_handlers") is None,
    reason="this torch_npu captures nothing after a capture that failed",
)


def needs_autograd_kernel(name: str) -> pytest.MarkDecorator:
    """Without one torch_npu warns in C++ and leaves the gradients out."""
    found = has_operator(name) and torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", "AutogradPrivateUse1")
    return pytest.mark.skipif(not found, reason=f"this torch_npu's {name} has no autograd kernel")


def sdpa_operator() -> str:
    """The operator that torch_npu's scaled_dot_product_attention ends in."""
    return "npu_fusion_attention_v3" if has_operator("npu_fusion_attention_v3") else "npu_fusion_attention"
