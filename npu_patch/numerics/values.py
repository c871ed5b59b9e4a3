"""Random numbers that are the same for the same seed, and nobody's random state."""

from __future__ import annotations

import array
import functools
import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor


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


PERIOD = 8191  # of the values of large inputs: a prime, so that no two rows are equal


def numbers(shape: Sequence[int], seed: int, dtype: torch.dtype) -> Tensor:
    """`values`, repeated where there are many of them: Python makes them one by one."""
    count = math.prod(shape)
    if count <= PERIOD:
        return values(shape, seed, dtype)
    return values((PERIOD,), seed).repeat(-(-count // PERIOD))[:count].view(tuple(shape)).to(dtype)
