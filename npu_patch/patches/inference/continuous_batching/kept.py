"""A manager for continuous batching, kept between calls that ask for the same: its cache and graphs are made once.

transformers makes one for each `generate_batch`, which trl calls at each step of training. Weights that were written in
place are seen by what is kept; keys and values of before are not used again. One manager is kept in a process, as long
as its model lives, in no more than a quarter of the device's memory.
"""

from __future__ import annotations

import gc
import inspect
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from npu_patch import log
from npu_patch.decoding.host_state import observe
from npu_patch.serving.calls import Calls
from npu_patch.serving.replacement import Unserved

CACHED = "_cached_continuous_batching_manager"  # where transformers looks for one
SET_BY_EACH_CALL = "training"
LARGEST_SHARE = 0.25
KEPT, MADE = "a kept manager", "a new manager"


@dataclass(frozen=True)
class Wanted:
    """`sizes`: how many requests at once, and how many blocks for each, where the caller does not say."""

    same: Hashable
    sizes: tuple[int, ...]

    def served_by(self, other: Wanted) -> bool:
        return self.same == other.same and all(a <= b for a, b in zip(self.sizes, other.sizes, strict=True))


@dataclass(frozen=True)
class Resting:
    """A manager at rest holds no model, or the model could not be freed."""

    manager: Any
    model: weakref.ref[torch.nn.Module]
    wanted: Wanted

    def release(self) -> None:
        dismiss(self.manager)


@dataclass
class KeepingCalls(Calls):
    """What is kept is let go where the patch is undone."""

    resting: Resting | None = field(default=None)

    def deactivate(self) -> None:
        super().deactivate()
        self.release()

    def release(self) -> None:
        resting, self.resting = self.resting, None
        if resting is not None:
            resting.release()

    def take(self, model: torch.nn.Module, wanted: Wanted) -> Any | None:
        """The manager that was kept for the model, if it is as wanted; else none is kept any more."""
        resting = self.resting
        if resting is not None and resting.model() is model and wanted.served_by(resting.wanted):
            self.resting = None
            return resting.manager
        self.release()
        return None

    def keep(self, manager: Any, model: torch.nn.Module, wanted: Wanted) -> None:
        manager.model = None
        self.resting = resting = Resting(manager, weakref.ref(model), wanted)
        ours = weakref.ref(self)

        def gone() -> None:
            calls = ours()
            if calls is not None and calls.resting is resting:
                calls.release()

        weakref.finalize(model, gone)  # the model's end or the process's

    __hash__ = object.__hash__


def serve(original: Callable[..., Any], device_type: str, calls: KeepingCalls) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def continuous_batching_context_manager(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["self"]
        reason = _why_not(self, given, device_type)
        return Unserved(reason) if reason is not None else _session(original, self, given, device_type, calls)

    return continuous_batching_context_manager


def _why_not(model: Any, given: dict[str, Any], device_type: str) -> str | None:
    if model.device.type != device_type:
        return f"a model on {model.device.type}"
    if given["persistent_manager"] or hasattr(model, CACHED):
        return "the caller keeps a manager"
    if getattr(model, "_device_mesh", None) is not None:
        return "tensor parallelism"
    return None


@contextmanager
def _session(
    original: Callable[..., Any], model: Any, given: dict[str, Any], device_type: str, calls: KeepingCalls
) -> Iterator[Any]:
    with torch.no_grad():
        wanted = _wanted(model, given)
        manager = calls.take(model, wanted)
    calls.ran_by[MADE if manager is None else KEPT] += 1
    ended = False
    try:
        if manager is None and given["warmup"] and _seeded(model, given):  # what warms it up draws, but once only
            names = ("generation_config", "continuous_batching_config", "workload_hints")
            manager = model.init_continuous_batching(**{name: given[name] for name in names})
            manager.warmup()
        if manager is not None:
            _renew(manager, model)
            setattr(model, CACHED, manager)
        with original(model, **{**given, "persistent_manager": True}) as manager:
            yield manager
        ended = True
    finally:
        vars(model).pop(CACHED, None)
        if manager is not None:
            reason = _why_not_kept(manager, device_type) if ended else "it ended with an error"
            if reason is None and calls.active:
                calls.keep(manager, model, wanted)
            else:
                dismiss(manager)
                calls.declined[KEPT] = reason or "restored meanwhile"


def _wanted(model: Any, given: dict[str, Any]) -> Wanted:
    generation, batching = _configs(model, given)
    hints, sizes = given["workload_hints"], (0, 0)
    if hints is not None:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.initialization import resolve_using_hints

        resolved = ContinuousBatchingConfig() if batching is None else deepcopy(batching)
        resolve_using_hints(resolved, hints)
        sizes = (resolved.max_requests_per_batch or 0, resolved.max_blocks_per_request or 0)
    autocast = torch.is_autocast_enabled(model.device.type), torch.get_autocast_dtype(model.device.type)
    same = (
        observe(model, model.device.type, of_no_concern=(SET_BY_EACH_CALL,)).state,
        model.dtype,
        _words(generation),
        _words(batching),
        hints is None,
        autocast if given["warmup"] else None,
    )
    return Wanted(same, sizes)


def _configs(model: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    generation = given["generation_config"] or model.generation_config
    return generation, given["continuous_batching_config"] or getattr(generation, "continuous_batching_config", None)


def _seeded(model: Any, given: dict[str, Any]) -> bool:
    return getattr(_configs(model, given)[1], "seed", None) is not None


def _words(config: Any) -> str:
    return repr(sorted((name, repr(value)) for name, value in vars(config).items())) if config is not None else ""


def _renew(manager: Any, model: Any) -> None:
    """As a new one would be: it makes the model ready, numbers requests from 0, draws from a seed, and knows no keys
    and values."""
    manager.model = model.eval()
    manager._request_counter = 0
    processor = manager.batch_processor
    processor.cache.reset()
    processor.distributed_helper.set_tp_seed(processor.cb_config.seed, model.device)


def _why_not_kept(manager: Any, device_type: str) -> str | None:
    processor, status = manager.batch_processor, manager.background_thread_status
    if processor is None or status.fatal_error is not None or manager.is_running():
        return "it did not end well"
    if not manager.output_router.output_queue.empty() or not manager.input_queue.empty():
        return "requests or results are left"
    held, total = processor.cache.cache_tensor.nbytes, torch.get_device_module(device_type).mem_get_info()[1]
    if held > LARGEST_SHARE * total:
        return f"its cache takes {held / total:.0%} of the memory, up to {LARGEST_SHARE:.0%} is kept between calls"
    log.info(f"generate_batch: a cache of {held / 2**20:.0f} MiB and its graphs are kept for the next call")
    return None


def dismiss(manager: Any) -> None:
    """As transformers does after a call, in its order: graphs before the memory that they are over."""
    if manager.is_running():
        manager.destroy()
    manager.batch_processor = None
    with suppress(Exception):
        manager.distributed_helper.destroy_cpu_comm_group()
    gc.collect()
    torch.get_device_module().empty_cache()
