"""Captured steps: graphs of torch_npu's under transformers' own way of capturing, the lengths of keys renewed at each
replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from npu_patch import log
from npu_patch.decoding.graph import capturing
from npu_patch.numerics.error_text import error_text
from npu_patch.ops.attention.paged import LENGTHS
from npu_patch.patches.inference.continuous_batching.step import anew, running
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import TakenOver, Unfused

NAME = "NPUGraph"


class NotCaptured(RuntimeError):
    """What a step does cannot be captured; it has run eagerly before."""


class RenewedGraph:
    """A graph of the device's, to whose attention each replay tells the lengths of that step."""

    def __init__(self, device_type: str) -> None:
        self.captured = getattr(torch.get_device_module(device_type), NAME)()

    def replay(self) -> None:
        step = running()
        self.captured.replay()
        if self.captured.graph_dispatch_mode.graph_dispatch_records:
            assert step is not None, "a replay outside of its ModelRunner"
            self.captured.update([{LENGTHS: list(step.lengths)}])

    def reset(self) -> None:
        self.captured.reset()


def serve_graph(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    return lambda: RenewedGraph(device_type)


def serve_capture(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    @contextmanager
    def captured(graph: RenewedGraph, stream: Any, pool: Any) -> Iterator[None]:
        capture = capturing(graph.captured, device_type, stream=stream, pool=pool, auto_dispatch_capture=True)
        try:
            with anew(), capture:
                yield
        except Exception as problem:
            raise NotCaptured(error_text(problem)) from problem

    return lambda graph, stream, pool: captured(graph, stream, pool)


def serve_capturing_step(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    """A step that cannot be captured has run by then: those that follow run so too."""

    def capture_graph(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, *args, **kwargs)
        except NotCaptured as problem:
            if self.inputs_and_outputs.use_block_table:
                self.use_cuda_graph_decode = False
            else:
                self.use_cuda_graph_varlen = False
            log.warning(f"generate_batch goes on without a graph: {problem}")
            return Unfused(None, f"not captured: {problem}")

    return capture_graph


def serve_is_capturing(original: Callable[..., Any], device_type: str, calls: Calls) -> Callable[..., Any]:
    module = torch.get_device_module(device_type)

    def is_capturing() -> bool | TakenOver:
        return module.is_current_stream_capturing() or TakenOver(original())

    return is_capturing
