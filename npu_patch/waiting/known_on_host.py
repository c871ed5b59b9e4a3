"""Integers of a device whose values the host knows: what is asked about them is answered without a wait.

Models for images read grids, token ids and masks on the host dozens of times a step: loops over images, `tolist()`,
counts of image tokens, boolean indices. A `KnownOnHost` is such a tensor with its values beside it. What is computed of
it alone is computed on the host and known there in turn; where it meets another tensor of the device, its values go
there, once. A boolean index, whose shape the device would have to be asked for, becomes the places where it is true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from npu_patch.numerics.written import version_of
from npu_patch.serving.once_per_step import uploaded

Value = TypeVar("Value")
# Attributes that are tensors themselves: all others are those of the device.
DERIVED = tuple(getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "real", "data"))
FULL = slice(None)


class KnownOnHost(torch.Tensor):
    """`host`: its values, a tensor of the host."""

    host: Tensor
    _made: dict[str, tuple[int, Any]]  # of the host's values, with their version

    @staticmethod
    def __new__(cls, host: Tensor, device: torch.device) -> Any:
        known = torch.Tensor._make_wrapper_subclass(cls, host.shape, host.stride(), dtype=host.dtype, device=device)
        known.host, known._made = host, {}
        return known

    def there(self) -> Tensor:
        """On the device."""
        return self._once("there", lambda: uploaded(self.host, _device(self)))

    def rows(self) -> Tensor:
        """Of a mask: the numbers of its true elements, on the device."""
        return self._once("rows", lambda: uploaded(self.host.reshape(-1).nonzero().flatten(), _device(self)))

    def places(self) -> tuple[Tensor, ...]:
        """Of a mask: a tensor of the device for each dimension."""
        return tuple(uploaded(each, _device(self)) for each in self.host.nonzero(as_tuple=True))

    def _once(self, name: str, make: Callable[[], Value]) -> Value:
        version = version_of(self.host)
        kept = self._made.get(name)
        if kept is None or version is None or kept[0] != version:
            with torch.inference_mode(self.host.is_inference()):
                kept = self._made[name] = (-1 if version is None else version), make()
        value: Value = kept[1]
        return value

    def _written_there(self, before: int | None) -> None:
        """Somebody wrote to the copy on the device: the host has to be told."""
        there = self._made["there"][1]
        if version_of(there) != before:
            self.host.copy_(there)
            self._made = {"there": (version_of(self.host) or 0, there)}

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "get_device" or (name == "__get__" and func not in DERIVED):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        served = SERVED[func](*args, **kwargs) if func in SERVED else NotImplemented
        if served is not NotImplemented:
            return served
        if name in ("cuda", "npu"):
            return args[0]
        tensors: list[Tensor] = []
        host_args, host_kwargs = _mapped((args, kwargs), _host, tensors)
        known = [each for each in tensors if isinstance(each, KnownOnHost)]
        others = (each for each in tensors if not isinstance(each, KnownOnHost))
        numbers = all(each.dim() == 0 and each.device.type == "cpu" for each in others)
        devices = {_device(each) for each in known}
        if len(devices) == 1 and numbers and kwargs.get("device") is None:
            with contextlib.suppress(Exception):  # what the host does not compute, the device may; or says why not
                return _known(func(*host_args, **host_kwargs), devices.pop(), known)
        plain_args, plain_kwargs = _mapped((args, kwargs), KnownOnHost.there)
        versions = [version_of(each.there()) for each in known]
        result = func(*plain_args, **plain_kwargs)
        for each, version in zip(known, versions, strict=True):
            each._written_there(version)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """For whom torch asks below its functions: what autograd saves, modes of others."""
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return KnownOnHost(args[0].host, _device(args[0]))
        plain_args, plain_kwargs = _mapped((tuple(args), kwargs or {}), KnownOnHost.there)
        return func(*plain_args, **plain_kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy drops its names
        return f"KnownOnHost({self.host!r}, {_device(self)})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        there: Any = self.there()
        return there.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Any:
        return KnownOnHost(self.host.clone(), _device(self))


def _device(known: KnownOnHost) -> torch.device:
    with torch._C.DisableTorchFunctionSubclass():
        return known.device


def _host(known: KnownOnHost) -> Tensor:
    return known.host


def _mapped(value: Any, change: Callable[[KnownOnHost], Any], tensors: list[Tensor] | None = None) -> Any:
    """What a function of torch is given, and its tensors: torch's own trees take the host five times as long."""
    if isinstance(value, Tensor):
        if tensors is not None:
            tensors.append(value)
        return change(value) if isinstance(value, KnownOnHost) else value
    if type(value) in (tuple, list):
        return type(value)([_mapped(each, change, tensors) for each in value])
    if type(value) is dict:
        return {name: _mapped(each, change, tensors) for name, each in value.items()}
    return value


def _known(result: Any, device: torch.device, given: Sequence[KnownOnHost]) -> Any:
    """The tensors of a result on the host; what was written in place is itself."""

    def known(each: Tensor) -> Tensor:
        own = [one for one in given if one.host is each]
        return own[0] if own else KnownOnHost(each, device)

    if isinstance(result, Tensor):
        return known(result)
    of_tensors = isinstance(result, (tuple, list)) and len(result) > 0 and isinstance(result[0], Tensor)
    return tree_map_only(Tensor, known, result) if of_tensors else result


def _to(self: Any, *args: Any, **kwargs: Any) -> Any:
    """To its own device, or of another dtype, it stays known; elsewhere it is a tensor as any."""
    if not isinstance(self, KnownOnHost):
        return NotImplemented
    own, device, dtype = _device(self), None, None
    for each in (*args, *(kwargs.get(name) for name in ("device", "dtype", "other"))):
        if isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, (str, torch.device)) or type(each) is int:
            device = torch.device(each)
    if device is not None and (device.type != own.type or device.index not in (None, own.index)):
        return self.host.to(device=device, dtype=dtype, copy=True)
    if dtype in (None, self.host.dtype) and not kwargs.get("copy"):
        return self
    return KnownOnHost(self.host.to(dtype=dtype, copy=True), own)


def _cpu(self: KnownOnHost, *args: Any, **kwargs: Any) -> Tensor:
    return self.host.clone()


def _expand_as(self: Any, other: Any) -> Any:
    return (
        KnownOnHost(self.host.expand(other.shape), _device(self)) if isinstance(self, KnownOnHost) else NotImplemented
    )


def _with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """A size may be a tensor of one number."""

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, KnownOnHost):
            return NotImplemented
        args, kwargs = _mapped((args, kwargs), lambda each: each.there() if each.dim() else each.item())
        return function(self, *args, **kwargs)

    return called


def _masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    """Where the mask shows rows of `self` `[..., H]`."""
    shown = _of_rows(mask, self)
    if shown is None or isinstance(source, KnownOnHost) or source.dtype != self.dtype:
        return NotImplemented
    rows, width = shown.rows(), self.shape[-1]
    if source.numel() < rows.numel() * width:
        return NotImplemented
    given = source.reshape(-1)[: rows.numel() * width].view(-1, width)
    return self.reshape(-1, width).index_copy(0, rows, given).view(self.shape)


def _of_rows(mask: Any, of: Any) -> KnownOnHost | None:
    """The mask over the rows of `of` `[..., H]` that a mask `[..., 1]`, or one expanded from that, stands for."""
    if not isinstance(mask, KnownOnHost) or isinstance(of, KnownOnHost) or not isinstance(of, Tensor):
        return None
    host = mask.host
    if host.dtype != torch.bool or host.dim() != of.dim() or host.dim() < 2 or host.shape[:-1] != of.shape[:-1]:
        return None
    if host.shape[-1] != 1 and (host.shape[-1] != of.shape[-1] or host.stride(-1) != 0):
        return None
    kept: KnownOnHost = mask._once("of rows", lambda: KnownOnHost(host[..., 0], _device(mask)))
    return kept


def _get(self: Any, index: Any) -> Any:
    if isinstance(self, KnownOnHost):
        return NotImplemented
    shown = _of_rows(index, self) if isinstance(index, KnownOnHost) and index.shape == self.shape else None
    if shown is not None:
        return self.reshape(-1, self.shape[-1]).index_select(0, shown.rows()).flatten()
    leading = _leading(self, index)
    if leading is not None:
        return self.flatten(0, leading.dim() - 1).index_select(0, leading.rows())
    return self[_index(index)]


def _set(self: Any, index: Any, value: Any) -> Any:
    """None: it is done."""
    if isinstance(self, KnownOnHost):
        return NotImplemented
    value = value.there() if isinstance(value, KnownOnHost) else value
    leading = _leading(self, index)
    if leading is not None and isinstance(value, Tensor) and value.dtype == self.dtype and self.is_contiguous():
        rows = leading.rows()
        if value.shape == (len(rows), *self.shape[leading.dim() :]):
            self.flatten(0, leading.dim() - 1).index_copy_(0, rows, value)
            return None
    self[_index(index)] = value
    return None


def _leading(of: Tensor, index: Any) -> KnownOnHost | None:
    """The mask over the first dimensions of `of` that an index is, with everything of the others."""
    first, *others = index if isinstance(index, tuple) else (index,)
    if not isinstance(first, KnownOnHost) or first.dtype != torch.bool or any(each != FULL for each in others):
        return None
    fits = first.dim() > 0 and first.dim() + len(others) <= of.dim() and first.shape == of.shape[: first.dim()]
    return first if fits else None


def _index(index: Any) -> Any:
    """Without a boolean one, and with numbers in place of tensors of one."""
    found: list[Any] = []
    for each in index if isinstance(index, tuple) else (index,):
        if not isinstance(each, KnownOnHost):
            found.append(each)
        elif each.host.dtype == torch.bool:
            found += each.places() if each.dim() else [bool(each.host)]
        else:
            found.append(each.there() if each.dim() else int(each.host))
    return tuple(found)


SERVED: dict[Any, Callable[..., Any]] = {
    Tensor.to: _to,
    Tensor.cpu: _cpu,
    Tensor.tolist: lambda self: self.host.tolist(),
    Tensor.expand_as: _expand_as,
    Tensor.masked_scatter: _masked_scatter,
    torch.masked_scatter: _masked_scatter,
    Tensor.__getitem__: _get,
    Tensor.__setitem__: _set,
    **{each: _with_numbers(each) for each in (Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full)},
}
