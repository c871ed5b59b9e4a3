"""Operators of torch_npu that the simulator lacks: each call raises `Refused` with the operator's name.

Without this they would run torch_npu's C++, which allocates the result and then launches a kernel that is not there:
that raises as well, but it names the kernel instead of the operator, and one that launches nothing would return memory
that nobody wrote.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .errors import Refused
from .overriding import override

# torch_npu's own kernels stay for what computes nothing, or is made of other operators.
KEPT = {
    "_npu_format_cast",  # between the base formats, the only ones on this chip unless a script allows others
    "_npu_format_cast.aclnn",
    "_npu_format_cast.input_dtype",
    "copy_memory_",
    "get_npu_format",
    "get_storage_size",
    "npu_change_data_ptr",
    "npu_format_cast",
    "npu_format_cast.Tensor",
    "npu_format_cast_",
    "npu_format_cast_.acl_format",
    "npu_prefetch",  # aclrtCmoAsync of cann_streams.c
    "npu_gather_backward",
    "npu_reshape",
    "npu_reshape.out",
}

_libraries: list[torch.library.Library] = []  # registrations end with the library object


def register(emulated: Iterable[str]) -> None:
    """Refuse every operator of torch_npu but the `emulated` ones and `KEPT`; names are as in "npu_max.dim"."""
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for name in missing(emulated):
        override(library, name, _refusing(name), "PrivateUse1")


def missing(emulated: Iterable[str]) -> list[str]:
    """The operators that this torch_npu has a kernel for and the simulator has not."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1")
    return sorted(
        {name.removeprefix("npu::") for name in registered if name.startswith("npu::")} - KEPT - set(emulated)
    )


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise Refused(f"{name}: the simulated NPU does not have this operator")

    return refuse
