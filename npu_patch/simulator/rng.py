"""Random numbers of the simulated NPU.

The state is that of torch_npu's own generators (a seed and a Philox offset), so manual_seed, get_rng_state,
set_rng_state and fork_rng are torch_npu's. Each random operator takes the next offset and draws from a CPU generator
seeded by (seed, offset): the numbers are not those of a real NPU, but equal states give equal numbers.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .current import current

OFFSET_STEP = 4  # Philox gives four numbers per step, and torch_npu requires multiples of it
_MASK = (1 << 64) - 1
_default_lock = threading.Lock()


def next_seed_and_offset(generator: torch.Generator | None, device: int) -> tuple[int, int]:
    """The state that the next draw uses; the generator moves on, except in a capture: each replay asks again. `None` is
    the device's default generator."""
    if current.capture is not None:
        if generator is not None:  # whether the graph knows it is known to torch_npu only
            current.capture.refuse("a random operator", "a generator other than the device's default one")
        return 0, 0  # nothing is computed
    if generator is None:
        generator = torch.get_device_module("npu").default_generators[device]
    offset = generator.get_offset()
    generator.set_offset(offset + OFFSET_STEP)
    return generator.initial_seed(), offset


def cpu_generator(seed: int, offset: int) -> torch.Generator:
    """A CPU generator that is a function of (seed, offset)."""
    return torch.Generator().manual_seed(_mixed(seed, offset))


@contextmanager
def default_cpu_generator(seed: int, offset: int) -> Iterator[None]:
    """The CPU's default generator set to a function of (seed, offset) within the block, for operators without a
    generator argument; then put back."""
    with _default_lock:
        before = torch.default_generator.get_state()
        torch.default_generator.manual_seed(_mixed(seed, offset))
        try:
            yield
        finally:
            torch.default_generator.set_state(before)


def _mixed(seed: int, offset: int) -> int:
    """Splitmix64: the CPU generator keeps only 32 bits of its seed, so near states must not give near seeds."""
    mixed = (seed + (offset + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return (mixed ^ (mixed >> 31)) & 0xFFFFFFFF
