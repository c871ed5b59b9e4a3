"""A graph as it was captured: kernels with the addresses that they read and write, and waits for external events."""

import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu
from torch import Tensor

from . import cann
from .current import current
from .errors import Refused

POISON = 0xFF

Written = Callable[[tuple[Any, ...], dict[str, Any]], Iterable[Any]]
"""Which of its arguments a kernel writes to."""


@dataclass
class Node:
    """One kernel as it was captured, or, without one, a wait for or a reset of an external event."""

    name: str
    kernel: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    made: list[Tensor] = field(default_factory=list)
    result: Any = None
    event: int = 0

    def run(self) -> None:
        assert self.kernel is not None
        before, current.places = current.places, iter(self.made)
        try:
            with torch.no_grad():
                self.kernel(*self.args, **self.kwargs)
        finally:
            current.places = before


@dataclass
class Graph:
    number: int
    nodes: list[Node] = field(default_factory=list)
    saved: dict[int, bytes] = field(default_factory=dict)  # address -> what was there before the capture wrote to it
    on_host: list[Tensor] = field(default_factory=list)  # what is saved of the host must live as long
    fresh: dict[int, int] = field(default_factory=dict)  # address -> bytes of what the capture allocated
    group_starts: dict[int, int] = field(default_factory=dict)  # by stream
    freed_blocks_known: int = -1

    def record(self, name: str, kernel: Callable[..., Any], written: Written, args: Any, kwargs: Any) -> Any:
        for tensor in tensors_in(written(args, kwargs)):
            self._save(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
            if tensor.device.type != "npu":
                self.on_host.append(tensor)
        node = Node(name, kernel, _weak(args), _weak(kwargs))
        made: list[Tensor] = []
        current.capture, current.made = self, made
        try:
            result = kernel(*args, **kwargs)
        finally:
            current.capture = current.made = None
        for tensor in made:
            self.fresh[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        node.made, node.result = _weak(made), _weak(result)
        self.nodes.append(node)
        return result

    def copy(self, to: int, source: int, length: int) -> None:
        self._save(to, length)
        self.nodes.append(Node("aclrtMemcpyAsync", ctypes.memmove, (to, source, length)))

    def set(self, to: int, value: int, length: int) -> None:
        self._save(to, length)
        self.nodes.append(Node("aclrtMemsetAsync", ctypes.memset, (to, value, length)))

    def _save(self, address: int, length: int) -> None:
        if length and address not in self.fresh and len(self.saved.get(address, b"")) < length:
            self.saved[address] = ctypes.string_at(address, length)

    def undo(self) -> None:
        for address, length in self.fresh.items():
            if length:
                ctypes.memset(address, POISON, length)
        for address, content in self.saved.items():
            ctypes.memmove(address, content, len(content))
        self.saved, self.fresh, self.on_host = {}, {}, []

    def refuse(self, name: str, why: str) -> None:
        message = f"{name}: {why} is not permitted while a graph is being captured"
        stub().simulator_invalidate(self.number, message.encode())
        raise Refused(message)

    def check_memory(self) -> None:
        """Refuse a graph whose memory is no longer the device's."""
        library = stub()
        freed = library.simulator_blocks_freed()
        if freed == self.freed_blocks_known:
            return
        for node in self.nodes:
            for tensor in tensors_in((node.args, node.kwargs, node.made)):
                address = tensor.untyped_storage().data_ptr()
                if tensor.device.type == "npu" and address and not library.simulator_is_allocated(address):
                    raise Refused(
                        f"{node.name}: the memory of a tensor {list(tensor.shape)} went back to the device after the "
                        "capture (torch.npu.empty_cache()): keep every tensor that a graph reads"
                    )
        self.freed_blocks_known = freed


@dataclass
class Update:
    """The nodes of a task group that get new arguments, one launch after the other."""

    nodes: list[Node]
    done: int = 0

    def take(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        expected = self.nodes[self.done].name if self.done < len(self.nodes) else "nothing more"
        if name != expected:
            raise Refused(f"{name}: the task group that is being updated has {expected} here")
        node = self.nodes[self.done]
        self.done += 1
        node.args, node.kwargs = _weak(args), _weak(kwargs)
        return node.result


def written_by_schema(schema: Any, also: Iterable[str] = ()) -> Written:
    """The arguments that a schema marks as written to, and those called `also`."""
    marked = [
        (i, a.name)
        for i, a in enumerate(schema.arguments)
        if a.name in also or (a.alias_info is not None and a.alias_info.is_write)
    ]

    def written(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
        return [args[i] if i < len(args) else kwargs.get(name) for i, name in marked]

    return written


def everything(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[Any]:
    return [args, kwargs]


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def _weak(value: Any) -> Any:
    """npu tensors and pinned ones by their address only, other values of the host as they are now."""
    if isinstance(value, Tensor):
        if value.device.type != "npu":
            return value if value.is_pinned() else value.clone()
        weak = torch_npu._C._weak_ref_tensor(value)
        if value.is_conj():
            weak = weak.conj()
        if value.is_neg():
            weak = torch._neg_view(weak)
        return weak.requires_grad_() if value.requires_grad else weak
    if isinstance(value, list | tuple):
        return type(value)(_weak(item) for item in value)
    if isinstance(value, dict):
        return {key: _weak(item) for key, item in value.items()}
    return value


@functools.cache
def stub() -> ctypes.CDLL:
    library = cann.loaded()
    library.simulator_launch.argtypes, library.simulator_launch.restype = [ctypes.c_void_p], ctypes.c_int64
    library.simulator_invalidate.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    library.simulator_wait.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.simulator_is_allocated.argtypes = [ctypes.c_void_p]
    library.simulator_blocks_freed.restype = ctypes.c_uint64
    library.simulator_set_error.argtypes = [ctypes.c_char_p]
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library
