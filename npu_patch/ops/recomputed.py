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

from npu_patch.numerics.remade import Offer, Remade, offered, packed_already

LEAST_BYTES = 2**22  # of a product: fewer are not worth a launch in the backward


@contextlib.contextmanager
def recomputed(product: Tensor, make: Callable[..., Tensor], *parts: Tensor, by_all: bool = True) -> Any:
    """Within it, autograd keeps `product = make(*parts)` as `parts`. Put it around the consumers of the product alone.

    Our own functions ask for it (npu_patch/numerics/remade.py). For others, `by_all`, it is recognised by its memory,
    so views of it (a linear layer flattens its input) and several consumers (a LoRA branch) are served; each makes it
    anew. `make` must be deterministic. Does nothing where tensors are packed already, and while compiling.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or packed_already():
        yield
        return
    parts = tuple(part.detach() for part in parts)
    before = offered(Offer(product, product._version, Remade(make, parts)))
    try:
        with _by_its_memory(product, make, *parts) if by_all else contextlib.nullcontext():
            yield
    finally:
        offered(before)


def _by_its_memory(product: Tensor, make: Callable[..., Tensor], *parts: Tensor) -> Any:
    # Not the product itself, which the closures would keep.
    device, memory, version = product.device, product.untyped_storage().data_ptr(), product._version

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

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
