"""Where probes run: apart from every mode and hook of the training script, on fixed values of their own."""

from __future__ import annotations

import array
import contextlib
import functools
import math
import random
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _python_dispatch


@contextlib.contextmanager
def quiet_room() -> Iterator[None]:
    """Runs a probe apart from the caller's modes: devices, autocast, inference, fake tensors, gradients."""
    with (
        warnings.catch_warnings(action="ignore"),
        _python_dispatch._disable_current_modes(),
        torch._C.DisableTorchFunction(),  # torch.device("meta") as a context is a torch function mode
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        yield


def values(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Random numbers from a normal distribution, the same for the same seed, as a CPU leaf tensor.

    Made from Python's own generator through a buffer: `zero.Init` and `init_empty_weights` replace torch's factory
    functions, and torch's random state is the training script's.
    """
    numbers = bytearray(_random_bytes(math.prod(shape), seed))
    tensor = torch.frombuffer(numbers, dtype=torch.float32).view(tuple(shape)).to(dtype)
    return tensor.requires_grad_(grad)


@functools.lru_cache(maxsize=256)
def _random_bytes(count: int, seed: int) -> bytes:
    generator = random.Random(seed)
    return array.array("f", (generator.gauss(0.0, 1.0) for _ in range(count))).tobytes()
