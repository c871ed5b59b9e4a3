"""Where probes run: apart from every mode and hook of the training script, on fixed values of their own."""

from __future__ import annotations

import contextlib
import logging
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils import _python_dispatch

from npu_patch.numerics.process_settings import Aside


class _Room(threading.local):
    probes: int = 0


_ROOM = _Room()


def in_quiet_room() -> bool:
    """Whether it is a probe that is running in this thread: what it calls is nobody's training."""
    return _ROOM.probes > 0


_ASIDE = Aside(in_quiet_room)


@contextlib.contextmanager
def quiet_room() -> Iterator[None]:
    """Runs a probe apart from what is going on around it, which may be a forward or backward of the caller's.

    Of this thread: saved-tensor hooks (checkpointing, offloading), modes of torch functions and of dispatch (devices,
    fake tensors, selective checkpointing), transforms of torch.func, autocast, inference, gradients. Of the process:
    the host's random numbers, and see process_settings.py. The thread itself stays the caller's: it may hold locks of
    imports and of the journal.
    """
    _ROOM.probes += 1
    try:
        with _ASIDE, _apart():
            yield
    finally:
        _ROOM.probes -= 1


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    with (
        _python_dispatch._disable_current_modes(),
        torch._C.DisableTorchFunction(),  # torch.device("meta") as a context is a torch function mode
        temporarily_clear_interpreter_stack(),
        _without_saved_tensors_hooks(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        _random_state_kept(),
    ):
        yield


def _without_saved_tensors_hooks() -> contextlib.AbstractContextManager[Any]:
    """Autograd calls the innermost pair alone; where hooks are refused (torch.func), it calls none."""
    taken = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]  # torch's stub lacks it
    if not taken():
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Torch's random state, Python's and numpy's stay what they are, whatever the probed code draws."""
    own, numpy = random.getstate(), sys.modules.get("numpy.random")
    of_numpy = numpy.get_state() if numpy is not None else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(own)
        if numpy is not None:
            numpy.set_state(of_numpy)


@contextlib.contextmanager
def silent(loggers: Iterable[logging.Logger]) -> Iterator[None]:
    """Nothing is logged, and what transformers says once, it has not said yet."""
    found = {id(each): each for each in loggers}.values()
    before = [(each, dict(vars(each))) for each in found]
    for each in found:
        each.disabled = True
        for once in ("warning_once", "info_once"):
            setattr(each, once, lambda *args, **kwargs: None)
    try:
        yield
    finally:
        for each, attributes in before:
            each.disabled = attributes["disabled"]
            for once in ("warning_once", "info_once"):
                if once in attributes:
                    setattr(each, once, attributes[once])
                else:
                    delattr(each, once)
