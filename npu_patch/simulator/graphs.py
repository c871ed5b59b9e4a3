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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch_npu

from . import counters, fractal
from .errors import Refused
from .graph_nodes import Graph, Node, Update, Written, stub, tensors_in

# As in cann_streams.c.
(
    BEGIN, END, EXECUTE, DESTROY, GROUP_BEGIN, GROUP_END, UPDATE_BEGIN, UPDATE_END, EVENT_WAIT, EVENT_RESET,
    EVENT_RECORD, COPY, SET, PREFETCH,
) = range(14)  # fmt: skip
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, *[ctypes.c_int64] * 4)
WOULD_WAIT, INVALID = -1, -2
MODEL_EXECUTE, TASK_GROUP, INTERNAL = 507011, 107033, 507000


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
        if fractal.laid_out:
            fractal.require_taken(name, args, kwargs)
        if not _watching:
            return kernel(*args, **kwargs)
        return _launch(name, kernel, written, args, kwargs)

    return launch


def _launch(name: str, kernel: Callable[..., Any], written: Written, args: Any, kwargs: Any) -> Any:
    device = next((tensor.device.index for tensor in tensors_in((args, kwargs)) if tensor.device.type == "npu"), None)
    if device is None:
        device = torch.get_device_module("npu").current_device()
    stream = torch_npu._C._npu_getCurrentRawStream(device)
    if stream in _updates:
        return _updates[stream].take(name, args, kwargs)
    library = stub()
    number = library.simulator_launch(stream)
    if number in (WOULD_WAIT, INVALID):
        raise Refused(f"{name}: {library.aclGetRecentErrMsg().decode()}")
    return _graphs[number].record(name, kernel, written, args, kwargs) if number else kernel(*args, **kwargs)


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
            stub().simulator_wait(stopped.stream, 1)
            return
        elif node.name == "reset":
            _recorded.discard(node.event)
        elif node.name == "record":
            _record(node.event)
    stub().simulator_wait(stopped.stream, 0)


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
            stub().simulator_wait(stopped.stream, 0)
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


def _prefetch(graph: int, address: int, length: int, stream: int) -> int:
    if graph:
        _graphs[graph].nodes.append(Node("aclrtCmoAsync", counters.prefetch, (address, length, stream)))
    else:
        counters.prefetch(address, length, stream)
    return 0


_DONE: dict[int, Callable[..., int]] = {
    BEGIN: _begin, END: _end, EXECUTE: _execute, DESTROY: _destroy, GROUP_BEGIN: _group_begin, GROUP_END: _group_end,
    UPDATE_BEGIN: _update_begin, UPDATE_END: _update_end, EVENT_WAIT: _event("wait"), EVENT_RESET: _event("reset"),
    EVENT_RECORD: _event("record"), COPY: _copy, SET: _set,
    PREFETCH: _prefetch,
}  # fmt: skip
_ERRORS = {EXECUTE: MODEL_EXECUTE, UPDATE_BEGIN: TASK_GROUP, UPDATE_END: TASK_GROUP}


@CALLBACK
def _on_graph(what: int, graph: int, first: int, second: int, third: int) -> int:
    global _watching
    try:
        return _DONE[what](graph, first, second, third)
    except BaseException as error:  # none can pass through C
        stub().simulator_set_error(str(error).encode())
        return _ERRORS.get(what, INTERNAL)
    finally:
        _watching = bool(_captures or _updates or _stopped)


def install() -> None:
    """Let the stub ask here; no longer once Python ends, since graphs may live longer."""
    stub().simulator_on_graph(_on_graph)
    atexit.register(stub().simulator_on_graph, None)
