"""Copies between devices, reads by the host, and unwritten memory: aten operators with rules of their own."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import counters, memory


def _copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    to_npu, from_npu = self.device.type == "npu", src.device.type == "npu"
    to, source = (memory.alias(self) if to_npu else self), (memory.alias(src) if from_npu else src)
    with torch._C._AutoDispatchBelowAutograd():
        to.copy_(source)
    if counters._counting:
        if to_npu and from_npu:
            counters.launch("aten::copy_", [source], [to])
        elif from_npu:
            counters.host_copy("aten::copy_", counters.tensor_bytes(source))
        else:
            counters.upload(counters.tensor_bytes(source))
    return self


def _copy_from(self: Tensor, dst: Tensor, non_blocking: bool = False) -> Tensor:
    return _copy_(dst, self)


def _copy_from_and_resize(self: Tensor, dst: Tensor) -> Tensor:
    if dst.shape != self.shape:
        dst.resize_(self.shape)
    return _copy_(dst, self)


def _local_scalar_dense(self: Tensor) -> Any:
    if counters._counting:
        counters.host_copy("aten::_local_scalar_dense", self.element_size())
    return memory.alias(self).item()


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
    if target.type != "npu":
        return torch.empty_strided(like.size(), like.stride(), dtype=like.dtype, device=target)
    return memory.poisoned(like.size(), like.stride(), like.dtype, memory.index_of(target))


KERNELS: dict[str, Callable[..., Any]] = {
    "copy_": _copy_,
    "_copy_from": _copy_from,
    "_copy_from_and_resize": _copy_from_and_resize,
    "_local_scalar_dense": _local_scalar_dense,
    "empty.memory_format": _empty,
    "empty_strided": _empty_strided,
    "empty_like": _empty_like,
}
