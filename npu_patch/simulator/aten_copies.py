"""Copies between devices, reads by the host, and unwritten memory: aten operators with rules of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import counters, format_cast, fractal, memory
from .aten_kernel import Kernel
from .current import current
from .graphs import leaf
from .refusal import require


def _copy(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    to_npu, from_npu = self.device.type == "npu", src.device.type == "npu"
    if current.capture is not None and to_npu != from_npu:
        on_host = src if to_npu else self
        if not (non_blocking and on_host.is_pinned()):
            current.capture.refuse(
                "aten::copy_", "a copy between the device and memory that is not pinned, or without non_blocking,"
            )
    if from_npu and to_npu and self.dtype != src.dtype:
        rule = "FRACTAL_NZ into another dtype is an operator of old, Cast, over blocks: cast the format back first"
        require(not fractal.is_fractal(src), "aten::copy_", rule)
    source = memory.alias(src) if from_npu else src
    if to_npu and fractal.is_fractal(self):
        format_cast.write(self, source)
        return self
    to = memory.alias(self) if to_npu else self
    with torch._C._AutoDispatchBelowAutograd():
        to.copy_(source)
    if counters.is_counting():
        if to_npu and from_npu:
            counters.launch("aten::copy_", [source], [to])
        elif from_npu and current.capture is None:
            counters.host_copy("aten::copy_", counters.tensor_bytes(source))
        elif to_npu:
            counters.upload(counters.tensor_bytes(source))
    return self


_copy_ = leaf("aten::copy_", _copy, lambda args, kwargs: args[:1])


def _copy_from(self: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy_(dst, self, non_blocking)


def _copy_from_and_resize(self: Tensor, dst: Tensor) -> Tensor:
    if dst.shape != self.shape:
        dst.resize_(self.shape)
    return _copy_(dst, self)


def _read(self: Tensor) -> Any:
    if counters.is_counting():
        counters.host_copy("aten::_local_scalar_dense", self.element_size())
    return memory.alias(self).item()


_local_scalar_dense = leaf("aten::_local_scalar_dense", _read, lambda args, kwargs: ())


_clone_plain = Kernel(torch.ops.aten.clone.default).run


def _clone(self: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    if fractal.is_fractal(self):
        result = format_cast.empty_as(self)
        format_cast.write(result, memory.alias(self))
        return result
    return _clone_plain(self, memory_format=memory_format)


def _empty(
    size: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    stride = None
    if memory_format not in (None, torch.contiguous_format, torch.preserve_format):
        stride = torch.empty(size, device="meta", memory_format=memory_format).stride()
    return memory.poisoned(size, stride, dtype or torch.get_default_dtype(), memory.device_index(device, None) or 0)


def _empty_strided(
    size: Any,
    stride: Any,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    return memory.poisoned(size, stride, dtype or torch.get_default_dtype(), memory.device_index(device, None) or 0)


def _empty_like(
    self: Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
    memory_format: torch.memory_format | None = None,
) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        like = torch.ops.aten.empty_like.default(
            memory.alias(self), dtype=dtype, device="meta", memory_format=memory_format
        )
    target = self.device if device is None else device
    if fractal.is_fractal(self) and target.type == "npu" and like.is_contiguous() and like.dtype == self.dtype:
        return format_cast.empty_as(self)
    if target.type != "npu":
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=target)
    return memory.poisoned(like.size(), like.stride(), like.dtype, memory.index_of(target))


KERNELS: dict[str, Callable[..., Any]] = {
    "clone": leaf("aten::clone", _clone, lambda args, kwargs: ()),
    "copy_": _copy_,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    "_local_scalar_dense": _local_scalar_dense,
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "empty_like": _empty_like,
}
