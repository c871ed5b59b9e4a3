"""NPU graphs: a capture records kernels, a replay runs them over the same memory.

torch_npu's own NPUGraph, memory pools, task groups and `NPUGraph.update` run over this; cann_streams.c knows which
streams are captured.

- A capture computes nothing: after it what it changed is as before, and its results are poison (0xFF).
- Whatever waits for the device, copies pageable memory of the host or has a shape that depends on data is refused, and
  ends the capture.
- A graph keeps addresses, not tensors. Memory that went back to the allocator holds whatever is there now, as on a
  device; memory that went back to the device is refused.
- Numbers, lists and lengths on the host are those of the capture, unless a task group is updated. Random operators take
  the generator's state at the replay.
- A wait for an external event stops a replay until the event is recorded, which `NPUGraph.update` does. What comes next
  on that stream, and a host that waits for it, would wait for ever, and is an error.
"""

import atexit
import ctypes
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch_npu
from torch import Tensor

from . import cann, counters
from .current import current
from .errors import Refused

# As in cann_streams.c.
(
    BEGIN, END, EXECUTE, DESTROY, GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, EVENT_WAIT, EVENT_RESET,
    EVENT_RECORD, COPY, SET,
) = range(13)  # fmt: skip
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, *[ctypes.c_int64] * 4)
WOULD_WAIT, INVALID = -1, -2
MODEL_EXECUTE, TASK_GROUP, INTERNAL = 507011, 107033, 507000
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
    fresh: dict[int, int] = field(default_factory=dict)  # address -> bytes of what the capture allocated
    group_starts: dict[int, int] = field(default_factory=dict)  # by stream
    freed_blocks_known: int = -1

    def record(self, name: str, kernel: Callable[..., Any], written: Written, args: Any, kwargs: Any) -> Any:
        for tensor in _tensors(written(args, kwargs)):
            self._save(tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes())
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
        self.saved, self.fresh = {}, {}

    def refuse(self, name: str, why: str) -> None:
        message = f"{name}: {why} is not permitted while a graph is being captured"
        _library().simulator_invalidate(self.number, message.encode())
        raise Refused(message)

    def check_memory(self) -> None:
        """Refuse a graph whose memory is no longer the device's."""
        library = _library()
        freed = library.simulator_blocks_freed()
        if freed == self.freed_blocks_known:
            return
        for node in self.nodes:
            for tensor in _tensors((node.args, node.kwargs, node.made)):
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


@dataclass
class Stopped:
    """A replay at an external event that is not recorded."""

    graph: Graph
    position: int
    stream: int


_graphs: dict[int, Graph] = {}
_groups: list[tuple[int, list[Node]]] = []  # their graph, and its nodes
_updates: dict[int, Update] = {}  # by stream
_recorded: set[int] = set()  # external events
_stopped: list[Stopped] = []
_captures = 0
_watching = False  # whether a launch may be more than a launch


def leaf(name: str, kernel: Callable[..., Any], written: Written) -> Callable[..., Any]:
    """The kernel as streams have it: run, captured, or an update of one that was captured. It may not launch others."""

    @functools.wraps(kernel)
    def launch(*args: Any, **kwargs: Any) -> Any:
        if not _watching:
            return kernel(*args, **kwargs)
        return _launch(name, kernel, written, args, kwargs)

    return launch


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


def _launch(name: str, kernel: Callable[..., Any], written: Written, args: Any, kwargs: Any) -> Any:
    device = next((tensor.device.index for tensor in _tensors((args, kwargs)) if tensor.device.type == "npu"), None)
    if device is None:
        device = torch.get_device_module("npu").current_device()
    stream = torch_npu._C._npu_getCurrentRawStream(device)
    if stream in _updates:
        return _updates[stream].take(name, args, kwargs)
    library = _library()
    number = library.simulator_launch(stream)
    if number in (WOULD_WAIT, INVALID):
        raise Refused(f"{name}: {library.aclGetRecentErrMsg().decode()}")
    return _graphs[number].record(name, kernel, written, args, kwargs) if number else kernel(*args, **kwargs)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


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


def _go_on(stopped: Stopped) -> None:
    """Run the graph from there to its end, or to an external event that is not recorded."""
    nodes = stopped.graph.nodes
    for position in range(stopped.position, len(nodes)):
        node = nodes[position]
        if node.kernel is not None:
            node.run()
        elif node.name == "wait" and node.event not in _recorded:
            stopped.position = position
            _stopped.append(stopped)
            _library().simulator_wait(stopped.stream, 1)
            return
        elif node.name == "reset":
            _recorded.discard(node.event)
        elif node.name == "record":
            _record(node.event)
    _library().simulator_wait(stopped.stream, 0)


def _record(event: int) -> None:
    _recorded.add(event)
    for stopped in list(_stopped):
        if stopped.graph.nodes[stopped.position].event == event:
            _stopped.remove(stopped)
            _go_on(stopped)


def _begin(graph: int, *unused: int) -> int:
    global _captures
    _captures += 1
    _graphs[graph] = Graph(graph)
    return 0


def _end(graph: int, broken: int, *unused: int) -> int:
    global _captures
    _captures -= 1
    _graphs[graph].undo()
    if broken:
        del _graphs[graph]
    return 0


def _execute(graph: int, stream: int, *unused: int) -> int:
    _graphs[graph].check_memory()
    counters.replay()
    _go_on(Stopped(_graphs[graph], 0, stream))
    return 0


def _destroy(graph: int, *unused: int) -> int:
    """What it waited for, and what was recorded for it, ends with it."""
    global _stopped
    gone = _graphs.pop(graph, None)
    if gone is None:  # its capture was invalid
        return 0
    _recorded.difference_update(node.event for node in gone.nodes)
    for stopped in _stopped:
        if stopped.graph is gone:
            _library().simulator_wait(stopped.stream, 0)
    _stopped = [stopped for stopped in _stopped if stopped.graph is not gone]
    for number, (owner, _) in enumerate(_groups):
        if owner == graph:
            _groups[number] = graph, []
    return 0


def _group_begin(graph: int, stream: int, *unused: int) -> int:
    _graphs[graph].group_starts[stream] = len(_graphs[graph].nodes)
    return 0


def _group_end(graph: int, stream: int, *unused: int) -> int:
    start = _graphs[graph].group_starts.pop(stream)
    _groups.append((graph, [node for node in _graphs[graph].nodes[start:] if node.kernel is not None]))
    return len(_groups)


def _update_begin(unused: int, stream: int, group: int, *also_unused: int) -> int:
    _updates[stream] = Update(_groups[group - 1][1])
    return 0


def _update_end(unused: int, stream: int, *also_unused: int) -> int:
    update = _updates.pop(stream)
    if update.done != len(update.nodes):
        raise Refused(f"{update.done} of {len(update.nodes)} kernels of the task group were updated")
    return 0


def _event(what: str) -> Callable[..., int]:
    def note(graph: int, event: int, *unused: int) -> int:
        if graph:
            _graphs[graph].nodes.append(Node(what, event=event))
        elif what == "record":
            _record(event)
        elif what == "reset":
            _recorded.discard(event)
        return 0

    return note


def _copy(graph: int, *arguments: int) -> int:
    _graphs[graph].copy(*arguments)
    return 0


def _set(graph: int, *arguments: int) -> int:
    _graphs[graph].set(*arguments)
    return 0


_DONE: dict[int, Callable[..., int]] = {
    BEGIN: _begin, END: _end, EXECUTE: _execute, DESTROY: _destroy, GROUP_BEGIN: _group_begin, GROUP_END: _group_end,
    UPDATE_BEGIN: _update_begin, UPDATE_END: _update_end, EVENT_WAIT: _event("wait"), EVENT_RESET: _event("reset"),
    EVENT_RECORD: _event("record"), COPY: _copy, SET: _set,
}  # fmt: skip
_ERRORS = {EXECUTE: MODEL_EXECUTE, UPDATE_BEGIN: TASK_GROUP, UPDATE_END: TASK_GROUP}


@CALLBACK
def _on_graph(what: int, graph: int, first: int, second: int, third: int) -> int:
    global _watching
    try:
        return _DONE[what](graph, first, second, third)
    except BaseException as error:  # none can pass through C
        _library().simulator_set_error(str(error).encode())
        return _ERRORS.get(what, INTERNAL)
    finally:
        _watching = bool(_captures or _updates or _stopped)


@functools.cache
def _library() -> ctypes.CDLL:
    library = cann.loaded()
    library.simulator_launch.argtypes, library.simulator_launch.restype = [ctypes.c_void_p], ctypes.c_int64
    library.simulator_invalidate.argtypes = [ctypes.c_int64, ctypes.c_char_p]
    library.simulator_wait.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.simulator_is_allocated.argtypes = [ctypes.c_void_p]
    library.simulator_blocks_freed.restype = ctypes.c_uint64
    library.simulator_set_error.argtypes = [ctypes.c_char_p]
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    return library


def install() -> None:
    """Let the stub ask here; no longer once Python ends, since graphs may live longer."""
    _library().simulator_on_graph(_on_graph)
    atexit.register(_library().simulator_on_graph, None)
