"""The fused operators of torch_npu (`torch.ops.npu.npu_*`), each as its documentation describes it."""

import torch

from . import attention, rms_norm, rotary, swiglu
from .kernel import npu_kernel

FAMILIES = (rms_norm, rotary, swiglu, attention)

_libraries: list[torch.library.Library] = []  # registrations end with the library object


def register() -> None:
    """Register the leaf kernels only: torch_npu's own derivatives and autograd fallbacks stay in effect above them."""
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for family in FAMILIES:
        for name, kernel in family.KERNELS.items():
            library.impl(name, npu_kernel(name, kernel), "PrivateUse1", allow_override=True)
