"""The memory that npu tensors and CPU tensors share.

The storage of a simulated npu tensor is host memory (cann_stub.c), so a CPU tensor can be laid over it: kernels run on
that alias, and in-place operators need no copy back.
"""

import ctypes

import torch
from torch import Tensor

from . import fractal
from .current import current

CPU = torch.device("cpu")
_storage_over = torch._C._construct_storage_from_data_pointer
_empty_with_format = torch.ops.npu.empty_with_format.default  # torch_npu's factory beside the overridden aten ones
_npu = torch.get_device_module("npu")
_DEVICES = tuple(torch.device("npu", index) for index in range(_npu.device_count()))


def alias(tensor: Tensor) -> Tensor:
    """A CPU tensor over the same memory, with the same dtype, shape, strides, offset, conj and neg bits.

    It does not keep the memory alive: use it while the npu tensor exists. Of what lies in blocks (fractal.py) it is a
    copy, for reading only.
    """
    storage = tensor.untyped_storage()
    pointer = storage.data_ptr()
    if not pointer:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=CPU)
    if fractal.is_fractal(tensor):
        return fractal.matrix(tensor, elements(tensor))
    over = torch.empty(0, dtype=tensor.dtype, device=CPU).set_(
        _storage_over(pointer, CPU, storage.nbytes()), tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if tensor.is_conj():
        over = over.conj()
    if tensor.is_neg():
        over = torch._neg_view(over)
    return over


def elements(tensor: Tensor) -> Tensor:
    """The whole storage of an npu tensor as a flat CPU tensor over the same memory."""
    storage = tensor.untyped_storage()
    over = _storage_over(storage.data_ptr(), CPU, storage.nbytes())
    return torch.empty(0, dtype=tensor.dtype, device=CPU).set_(over)


def allocate(size: torch.Size, stride: tuple[int, ...], dtype: torch.dtype, device: int) -> Tensor:
    """An npu tensor from torch_npu's allocator, holding whatever the memory held."""
    dense = 1
    for length, step in zip(reversed(size), reversed(stride), strict=True):
        if step != dense and length != 1:
            break
        dense *= length
    else:
        return _empty_with_format(size, dtype=dtype, device=_DEVICES[device])
    flat = _empty_with_format((_span(size, stride),), dtype=dtype, device=_DEVICES[device])
    with torch._C._AutoDispatchBelowAutograd():  # a tensor of its own, not a view
        return flat.as_strided(size, stride)


def to_device(tensor: Tensor, device: int) -> Tensor:
    """A copy of a CPU tensor on the device, with its strides; in a replay, where it was at the capture."""
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if current.places is not None:
        result = next(current.places)
    else:
        result = allocate(tensor.size(), tensor.stride(), tensor.dtype, device)
    if current.made is not None:
        current.made.append(result)
    if tensor.numel():
        elements = _span(tensor.size(), tensor.stride())
        ctypes.memmove(result.data_ptr(), tensor.data_ptr(), elements * tensor.element_size())
    return result


def view_of(tensor: Tensor, layout: Tensor) -> Tensor:
    """An npu tensor over the storage of `tensor`, with shape, strides, offset and dtype of the CPU tensor `layout`."""
    result = allocate(torch.Size((0,)), (1,), layout.dtype, tensor.device.index)
    return result.set_(tensor.untyped_storage(), layout.storage_offset(), layout.size(), layout.stride())


def poisoned(size: torch.Size, stride: tuple[int, ...] | None, dtype: torch.dtype, device: int) -> Tensor:
    """What torch.empty gives: every byte is 0xFF (NaN for floats, -1 for signed integers), so that code which reads
    memory that it never wrote is caught."""
    if stride is None:
        result = _empty_with_format(size, dtype=dtype, device=_DEVICES[device])
    else:
        result = allocate(size, stride, dtype, device)
    if bytes_allocated := result.untyped_storage().nbytes():
        ctypes.memset(result.data_ptr(), 0xFF, bytes_allocated)
    return result


def device_index(device: torch.device | None, default: int | None) -> int | None:
    """The index of an npu device (without one: the current device); `default` for any other device."""
    return default if device is None or device.type != "npu" else index_of(device)


def index_of(device: torch.device) -> int:
    """Of an npu device; without an index it is the current one."""
    return or_current(device.index)


def or_current(index: int | None) -> int:
    return _npu.current_device() if index is None else index


def _span(size: torch.Size, stride: tuple[int, ...]) -> int:
    """Elements from the first to the last, inclusive."""
    if 0 in size:
        return 0
    return 1 + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
