"""What torch has once for the process, put aside while any probe runs: several threads may observe at once.

Only what a probe could meet: hooks on all modules (which go on hearing of every other thread), the default dtype
(transformers sets it while it makes a model), anomaly detection, and the filters of warnings.
"""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.modules import module as torch_modules

# By the ids of their handles; the others of that kind hold flags of these.
HOOKS_ON_ALL_MODULES: list[dict[int, Callable[..., Any]]] = [
    value
    for name, value in vars(torch_modules).items()
    if name.startswith("_global_") and name.endswith("_hooks") and isinstance(value, dict)
]


class Aside:
    """The first that comes puts aside, the last that leaves puts back. `is_probe()`: whether this thread runs one."""

    def __init__(self, is_probe: Callable[[], bool]) -> None:
        self.is_probe = is_probe
        self.lock = threading.Lock()  # held for no longer than that: whoever is inside may wait for other locks
        self.inside = 0
        self.put_back = contextlib.ExitStack()
        os.register_at_fork(
            before=self.lock.acquire, after_in_parent=self.lock.release, after_in_child=self._after_fork
        )

    def __enter__(self) -> None:
        with self.lock:
            if self.inside == 0:
                self.put_back.enter_context(_settings(self.is_probe))
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.put_back.close()

    def _after_fork(self) -> None:
        """The other threads that were inside are not in the child."""
        if self.inside and not self.is_probe():
            self.inside = 0
            self.put_back.close()
        self.lock.release()


@contextlib.contextmanager
def _settings(is_probe: Callable[[], bool]) -> Iterator[None]:
    dtype, anomaly = torch.get_default_dtype(), (torch.is_anomaly_enabled(), torch.is_anomaly_check_nan_enabled())
    with warnings.catch_warnings(), _deaf_to_probes(is_probe):
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.set_anomaly_enabled(False)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_anomaly_enabled(*anomaly)


@contextlib.contextmanager
def _deaf_to_probes(is_probe: Callable[[], bool]) -> Iterator[None]:
    stood: list[tuple[dict[int, Any], int, Any, Any]] = []
    for hooks in HOOKS_ON_ALL_MODULES:
        for key, hook in [item for item in hooks.items() if isinstance(item[0], int)]:  # ours is deaf of itself
            hooks[key] = deaf = _unless_probe(is_probe, hook)
            stood.append((hooks, key, hook, deaf))
    try:
        yield
    finally:
        for hooks, key, hook, deaf in stood:
            if hooks.get(key) is deaf:  # else it was removed meanwhile
                hooks[key] = hook


def _unless_probe(is_probe: Callable[[], bool], hook: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: None if is_probe() else hook(*args, **kwargs)
