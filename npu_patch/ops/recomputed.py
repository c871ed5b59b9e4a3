"""A product that autograd keeps as what it was made of, and makes again in the backward.

product = swiglu(gate, up)
with recomputed(product, swiglu, gate, up):
    return down_proj(product)  # would keep `product`; swiglu itself keeps gate and up
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def recomputed(product: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Any:
    """Within it, autograd keeps `product = make(*parts)` as `parts`. Put it around the consumers of the product alone.

    The product is recognised by its memory, so views of it (a linear layer flattens its input) and several consumers (a
    LoRA branch) are served; each makes it anew. `make` must be deterministic. Does nothing where tensors are packed
    already (non-reentrant checkpointing makes everything again, offloading moves it), and while compiling.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or _packed_already():
        yield
        return
    # Not the product itself, which the closures would keep.
    device, memory, version = product.device, product.untyped_storage().data_ptr(), product._version
    parts = tuple(part.detach() for part in parts)

    def pack(saved: Tensor) -> Any:
        if saved.device != device or saved.numel() == 0 or saved.untyped_storage().data_ptr() != memory:
            return saved
        if saved._version != version:  # a consumer has changed it in place
            return saved
        return saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return make(*parts).as_strided(*packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _packed_already() -> bool:
    """Whether other hooks take what autograd keeps; where this torch does not tell, as if there were some."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is None or top(True) is not None
