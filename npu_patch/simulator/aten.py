"""Every aten operator of the npu device, run on the CPU over the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

from . import aten_copies, aten_dropout, aten_formulas, aten_recurrent, graph_nodes, graphs
from .aten_kernel import Kernel
from .overriding import override

# torch_npu's own kernels stay for what only concerns shapes, storages, allocations and streams. Views stay as well
# (`is_view`).
KEPT = {
    "_has_compatible_shallow_copy_type",
    "_lazy_clone",
    "_pin_memory",
    "_to_copy",  # what it does to float64 and to copies that do not wait; it ends in empty_strided and copy_
    "as_strided_",
    "is_pinned",
    "is_set_to",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "resize_as_",
    "scaled_dot_product_attention",  # torch_npu's own branches, which end in the fused operators
    "_fused_sdp_choice",
    "_scaled_dot_product_attention_math",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "to_padded_tensor",
}

# torch_npu's autograd kernels of these call a CANN operator themselves. None of them has a gradient.
AUTOGRAD_TOO = {
    "affine_grid_generator_backward",
    "conv_tbc_backward",
    "max.out",
    "min.out",
    "nanmean.out",
    "one_hot",
}

_libraries: list[torch.library.Library] = []  # registrations end with the library object


def register() -> None:
    """Override every aten kernel that torch_npu registers for the npu device."""
    kernels: dict[tuple[str, str], Callable[..., Any]] = {}  # by name and key; the last one counts
    for registered in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = registered.partition("::")
        if namespace != "aten" or name in KEPT:
            continue
        operator = _operator(name)
        if operator is None or operator.is_view or torch.Tag.inplace_view in operator.tags:
            continue
        kernels[name, "PrivateUse1"] = _kernel(name, operator)
    for name in AUTOGRAD_TOO:
        kernels[name, "AutogradPrivateUse1"] = _kernel(name, _known(name))
    for name, composite in aten_formulas.COMPOSITES.items():
        kernels[name, "AutogradPrivateUse1"] = composite
    for name, kernel in (aten_copies.KERNELS | aten_dropout.KERNELS | aten_recurrent.KERNELS).items():
        kernels[name, "PrivateUse1"] = kernel
    for name in aten_recurrent.COMPOSED:
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            kernels[name, key] = aten_recurrent.composed(_known(name))
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for (name, key), kernel in kernels.items():
        override(library, name, kernel, key)


def _known(name: str) -> OpOverload:
    operator = _operator(name)
    if operator is None:
        raise LookupError(f"torch has no aten::{name}")
    return operator


def _kernel(name: str, operator: OpOverload) -> Callable[..., Any]:
    formula = aten_formulas.FORMULAS.get(name)
    kernel = aten_formulas.on_device(name, formula) if formula else Kernel(operator).run
    return graphs.leaf(operator._schema.name, kernel, graph_nodes.written_by_schema(operator._schema))


def _operator(name: str) -> OpOverload | None:
    """`name` as in "add.Tensor". None for the names that torch_npu registers without a schema."""
    packet, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload or "default")
    except AttributeError:
        return None
