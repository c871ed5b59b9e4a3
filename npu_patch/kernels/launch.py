"""How a kernel is spread over a device: how many programs, how large a tile, and the launch itself.

Every kernel has a one-dimensional grid and loops over its blocks with the stride of the grid, so any number of programs
computes the same. An Ascend device gets as many programs as it has vector cores, each with the largest tile that its
on-chip buffer holds; a CUDA device gets one program for each small tile, for its scheduler hides the latency, except
where each program leaves a row of partial sums.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Of one vector core of an Ascend 910B. triton-ascend has no query for it; the larger buffer of a later chip is not
# exhausted. The compiler refuses a kernel that needs more, and double-buffers one that needs less than half.
UNIFIED_BUFFER = 192 * 1024
MOST_WARPS = 16
LEAST_INT32, MOST_INT32 = -(2**31), 2**31 - 1
KEPT = 1024  # tilings, by shapes: a training with packing or padding meets many lengths
# What runs the kernels of a device type instead of triton's own launcher: the simulator's, for "npu".
RUNNERS: dict[str, Callable[[Any, int, tuple[Any, ...], dict[str, Any]], None]] = {}
_AS_IT_IS = contextlib.nullcontext()


@dataclass(frozen=True, eq=False)  # one for each device; to hash its fields costs the host as much as to tile
class Machine:
    """What grids and tiles are chosen from. `on_chip_bytes` of one core, or None where registers hold the tile.

    `exact_widths`: the compiler takes `arange` of any length, not of powers of two alone (triton-ascend does).
    """

    device_type: str
    cores: int
    on_chip_bytes: int | None = None
    exact_widths: bool = False


@dataclass(frozen=True, eq=False)
class Tile:
    """What suits one kernel, on either device.

    `bytes_per_element`: what the Ascend compiler plans on chip for each element of a tile, double buffers included.
    `least_bytes`: what it needs for each of a single row, where it gives up double buffers for lack of room; 0 for
    kernels that take a row in parts.
    On CUDA: `elements` of a program's tile, of one of its threads, how many programs a multiprocessor gets where each
    leaves a row of partial sums, and how many turns of its loop are in flight.
    """

    bytes_per_element: int
    elements: int
    elements_per_thread: int = 32
    programs: int = 4
    stages: int = 1
    least_bytes: int = 0


@functools.lru_cache
def machine_of(device: torch.device) -> Machine:
    if device.type == "npu":
        cores = torch.get_device_module("npu").get_device_properties(device).vector_core_num
        return Machine("npu", max(1, cores), UNIFIED_BUFFER, exact_widths=True)
    if device.type == "cuda":
        return Machine("cuda", torch.cuda.get_device_properties(device).multi_processor_count)
    return Machine(device.type, os.cpu_count() or 1)  # the interpreter


def widest_row(machine: Machine, *tiles: Tile) -> int | None:
    """How many elements of a row fit on chip, for kernels that hold a whole one; None where nothing limits it."""
    return None if machine.on_chip_bytes is None else machine.on_chip_bytes // max(tile.least_bytes for tile in tiles)


def why_too_wide(device: torch.device, length: int, *tiles: Tile) -> str | None:
    """Why kernels of these tiles cannot hold a row of `length` elements on `device`, or None."""
    widest = widest_row(machine_of(device), *tiles)
    return None if widest is None or length <= widest else f"{length} wide: {widest} is the most that fits on chip"


def programs(machine: Machine, blocks: int, tile: Tile, leave_partial_sums: bool = False) -> int:
    """The size of the grid that works through `blocks` blocks."""
    if machine.device_type != "cuda":
        return max(1, min(machine.cores, blocks))
    return max(1, min(machine.cores * tile.programs, blocks) if leave_partial_sums else blocks)


def width(machine: Machine, length: int) -> int:
    """The extent of a tile that spans `length` elements."""
    return length if machine.exact_widths else power_of_two(length)


def tile_rows(machine: Machine, tile: Tile, row: int, rows: int) -> int:
    """How many rows of `row` elements make a tile, a power of two; no more than leave every core some of `rows`."""
    room = machine.on_chip_bytes // tile.bytes_per_element if machine.on_chip_bytes else tile.elements
    fair = power_of_two(-(-rows // machine.cores))
    return max(1, min(_power_of_two_within(max(1, room // row)), fair))


def stages(machine: Machine, tile: Tile) -> int:
    """How many turns of a loop are in flight. Ascend's compiler double-buffers by itself."""
    return tile.stages if machine.device_type == "cuda" else 1


def blocks_of(length: int, block: int) -> int:
    """How many blocks hold `length`. Since triton 3.6 `triton.cdiv` costs the host more than the rest of a grid."""
    return -(-length // block)


def power_of_two(length: int) -> int:
    """The smallest that is no less than `length`."""
    return 1 << max(0, length - 1).bit_length()


def warps(tile: Tile, elements: int) -> int:
    """Warps of a CUDA program that holds a tile of `elements`."""
    return max(1, min(MOST_WARPS, power_of_two(elements) // (32 * tile.elements_per_thread)))


def launch(
    kernel: Any, device: torch.device, grid: int, *arguments: Any, num_warps: int | None = None, **constants: Any
) -> None:
    """Runs `kernel` as `grid` programs. `num_warps` is for CUDA: nothing depends on it but time.

    Triton's own way to what it has compiled (binding the arguments by name, a key in text, checks of globals) costs the
    host more than most of these kernels cost the device, so what it compiled is kept, under all that it depends on.
    """
    runner = RUNNERS.get(device.type)
    if runner is not None:
        runner(kernel, grid, arguments, constants)
        return
    key = _key(kernel, device, num_warps, arguments, constants)
    compiled = _COMPILED.get(key)
    with _current(device):
        if compiled is not None:
            compiled.kernel[(grid, 1, 1)](*arguments, *compiled.constants)
            return
        options = {"num_warps": num_warps} if device.type == "cuda" and num_warps is not None else {}
        _keep(key, kernel, kernel[(grid,)](*arguments, **constants, **options), constants)


class Planned:
    """Launches of a kernel that differ in the memory of their tensors alone: what else they are given, the dtypes of
    the tensors too, never changes. Nor does what was compiled, as long as the memory is aligned.
    """

    def __init__(
        self, kernel: Any, device: torch.device, grid: int, scalars: tuple[int | float, ...], **constants: Any
    ) -> None:
        self._planned, self._device_type = (kernel, device, grid, scalars, constants), device.type
        self._run: Callable[..., None] | None = None
        self._rest: tuple[Any, ...] = ()  # what comes after tensors and seed

    def __call__(self, tensors: Sequence[torch.Tensor | None], *seed: Any) -> None:
        """The kernel's arguments: tensors, a seed that is always of one kind, then the scalars."""
        memory = 0
        for tensor in tensors:
            if tensor is not None:
                memory |= tensor.data_ptr()
        kernel, device, grid, scalars, constants = self._planned
        if self._run is None or memory & 15 or self._device_type in RUNNERS:
            launch(kernel, device, grid, *tensors, *seed, *scalars, **constants)
            if not memory & 15:
                self._keep(kernel, device, grid, (*tensors, *seed, *scalars), dict(constants))
            return
        with _current(device):
            self._run(*tensors, *seed, *self._rest)

    def _keep(
        self, kernel: Any, device: torch.device, grid: int, arguments: tuple[Any, ...], constants: dict[str, Any]
    ) -> None:
        num_warps, scalars = constants.pop("num_warps", None), self._planned[3]
        compiled = _COMPILED.get(_key(kernel, device, num_warps, arguments, constants))
        if compiled is not None:
            self._run, self._rest = compiled.kernel[(grid, 1, 1)], (*scalars, *compiled.constants)


@dataclass(frozen=True)
class _Compiled:
    """What triton made of a kernel for arguments of one kind, and what it is given after these."""

    kernel: Any
    constants: tuple[Any, ...]


# By the kernel (which lives as long as its module), and by what triton compiles it anew for.
_COMPILED: dict[tuple[Any, ...], _Compiled] = {}


def _keep(key: tuple[Any, ...], kernel: Any, made: Any, constants: dict[str, Any]) -> None:
    signature = getattr(getattr(made, "src", None), "signature", None)
    if signature is None:  # the interpreter compiles nothing
        return
    # Newer tritons pass constants on to the launcher, and have them in the signature; triton-ascend 3.2 does not.
    passed = [constants[name] for name in kernel.arg_names if name in constants]
    _COMPILED[key] = _Compiled(made, tuple(passed) if "constexpr" in signature.values() else ())


def _key(
    kernel: Any, device: torch.device, num_warps: int | None, arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, ...]:
    """All that triton compiles a kernel anew for: of a tensor, its dtype and alignment; of an integer, whether it is 1
    or a multiple of 16, and its width. In one loop: it is made for every launch."""
    found: list[Any] = [id(kernel), device, num_warps]
    add = found.append
    for value in arguments:
        kind = type(value)
        if kind is int:
            add(1 if value == 1 else 16 if not value & 15 else 0)
            if not LEAST_INT32 <= value <= MOST_INT32:
                add("wide")
        elif value is not None and isinstance(value, torch.Tensor):
            add(value.dtype)
            if value.data_ptr() & 15:
                add("unaligned")
        else:
            add(kind)
    found.extend(constants.values())
    return tuple(found)


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which under a device map is not always the tensors'."""
    module = getattr(torch, device.type, None) if device.type != "cpu" else None
    if module is None or device.index in (None, module.current_device()):
        return _AS_IT_IS
    return module.device(device)


def _power_of_two_within(length: int) -> int:
    return 1 << (length.bit_length() - 1)
