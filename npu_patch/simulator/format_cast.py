"""Casts between formats: `npu_format_cast`, and copies of what lies in blocks (fractal.py)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch_npu
from torch import Tensor

from . import counters, fractal, memory
from .current import current
from .errors import Refused
from .graphs import leaf
from .overriding import override

_empty = torch.ops.npu.empty_with_format.default
BASE = (0, 1, 2, 30)  # NCHW, NHWC, ND, NCDHW
_libraries: list[torch.library.Library] = []  # registrations end with the library object


def _format_cast(input: Tensor, acl_format: int) -> Tensor:
    """What torch_npu's `npu_format_cast` and `npu_format_cast_` end in, and what has their derivative."""
    if torch_npu.get_npu_format(input) == acl_format:
        return input
    if current.capture is not None:
        current.capture.refuse("npu::npu_format_cast", "a cast of formats, an operator that is compiled at the call,")
    result = _empty_in(acl_format, input)
    write(result, memory.alias(input))
    return result


def _format_cast_in_place(input: Tensor, format: int | Tensor, **unused: object) -> Tensor:
    cast = _format_cast(input, format if isinstance(format, int) else int(torch_npu.get_npu_format(format)))
    return input if cast is input else input.set_(cast.untyped_storage(), 0, cast.size(), cast.stride())


def empty_as(tensor: Tensor) -> Tensor:
    """Unwritten, of the shape and format of one that lies in blocks."""
    result = _empty_in(fractal.FRACTAL_NZ, tensor)
    if torch_npu.get_npu_format(result) == fractal.FRACTAL_NZ:
        fractal.laid_out[result.untyped_storage().data_ptr()] = result.size()
    return result


def _empty_in(acl_format: int, like: Tensor) -> Tensor:
    """As torch_npu allocates it for a cast or a copy: in a base format where internal ones are not allowed."""
    if acl_format not in BASE and torch_npu._C._npu_getOption("ALLOW_INTERNAL_FORMAT") != b"enable":
        warnings.warn(
            "Cannot create tensor with internal format while allow_internel_format=False, tensor will be created with "
            "base format.",
            stacklevel=2,
        )
        acl_format = fractal.ND
    return _empty(like.size(), dtype=like.dtype, device=like.device, acl_format=acl_format)


def write(to: Tensor, values: Tensor) -> None:
    """The values into an npu tensor of any format: one cast, which is a launch."""
    if counters.is_counting():
        counters.launch("npu::npu_format_cast", [values], [torch.empty(to.shape, dtype=to.dtype, device="meta")])
    with torch._C._AutoDispatchBelowAutograd():
        if torch_npu.get_npu_format(to) != fractal.FRACTAL_NZ:
            memory.alias(to).copy_(values)
            return
        if to.dim() < 2 or not to.is_contiguous() or to.storage_offset():
            raise Refused(f"npu_format_cast: FRACTAL_NZ of a tensor {list(to.shape)} with strides {list(to.stride())}")
        fractal.laid_out[to.untyped_storage().data_ptr()] = to.size()
        memory.elements(to).copy_(fractal.blocks(values.to(to.dtype)))


KERNELS: dict[str, Callable[..., Any]] = {
    "_npu_format_cast": _format_cast,
    "npu_format_cast_": _format_cast_in_place,
    "npu_format_cast_.acl_format": _format_cast_in_place,
}


def register() -> None:
    library = torch.library.Library("npu", "IMPL")
    _libraries.append(library)
    for name, kernel in KERNELS.items():
        override(library, name, leaf("npu::_npu_format_cast", kernel, lambda args, kwargs: ()), "PrivateUse1")
