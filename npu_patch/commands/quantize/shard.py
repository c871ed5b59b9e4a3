"""Writes one shard, a piece of a tensor at a time: memory is a few pieces, however large the shard is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from npu_patch.checkpoints.safetensors_file import ITEM_BYTES, BadCheckpoint, Entry
from npu_patch.checkpoints.w8a8 import SCALE
from npu_patch.commands.quantize.int8 import int8_of
from npu_patch.commands.quantize.plan import Shard
from npu_patch.commands.quantize.selection import Selected, Selection

PIECE = 8 * 2**20  # bytes that are read at once, but for a matrix that cannot be cut
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class Written:
    """SHA-256 of the shard that was read and of the one that was written."""

    source: str
    target: str


def write_shard(
    source: Path, to: Path, shard: Shard, selection: Selection, done: Callable[[int], None] = lambda size: None
) -> Written:
    """The file is on the disk, whole, when this returns. `done`: called with the bytes that were read.

    Raises:
        BadCheckpoint: if a weight cannot be quantised, or the source is not any more what its header said.
        OSError: if it cannot be written.
    """
    places = {entry.name: entry.start for entry in shard.target.entries}
    with source.open("rb") as read, to.open("w+b") as write:
        hashed = hashlib.sha256()
        hashed.update(_exactly(read, shard.source.start, source))
        write.write(shard.first_bytes)
        write.truncate(shard.target.size)  # what is not written below, offsets, is zero
        for entry in shard.source.entries:
            chosen = selection.selected.get(entry.name)
            for number, shape in enumerate(_pieces(entry, chosen)):
                piece = _exactly(read, shape.numel() * ITEM_BYTES[entry.dtype], source)
                hashed.update(piece)
                for name, data in _written(piece, shape, number, entry, chosen, source):
                    places[name] += _put(write, places[name], data)
                done(len(piece))
        write.flush()
        os.fsync(write.fileno())
    return Written(hashed.hexdigest(), sha256_of(to))


def sha256_of(path: Path, done: Callable[[int], None] = lambda size: None) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            hashed.update(piece)
            done(len(piece))
    return hashed.hexdigest()


def _pieces(entry: Entry, chosen: Selected | None) -> Iterator[torch.Size]:
    """Shapes of what is read one after the other: whole channels of a weight."""
    item = ITEM_BYTES[entry.dtype]
    if chosen is None:
        rows, row = entry.size // item, torch.Size(())
    elif chosen.summed_over == len(entry.shape) - 1:
        rows, row = entry.size // item // entry.shape[-1], torch.Size(entry.shape[-1:])
    else:  # of packed experts, an expert at a time
        rows, row = entry.shape[0], torch.Size(entry.shape[1:])
    step = max(1, PIECE // (row.numel() * item))
    if chosen is not None and chosen.apart:
        step = rows // entry.shape[0]
    for first in range(0, rows, step):
        yield torch.Size((min(step, rows - first), *row))


def _written(
    piece: bytearray, shape: torch.Size, number: int, entry: Entry, chosen: Selected | None, source: Path
) -> Iterator[tuple[str, bytearray | memoryview]]:
    """What the piece of that number adds to which tensors."""
    if chosen is None:
        yield entry.name, piece
        return
    values = torch.frombuffer(piece, dtype=DTYPES[entry.dtype]).view(shape)
    try:
        weight, scale = int8_of(values, 1)
    except ValueError as error:
        raise BadCheckpoint(f"{source}: {entry.name} cannot be quantised: {error}") from error
    names = chosen.names(number) or [entry.name]
    if chosen.apart and len(shape) == 3:  # an expert whose inputs come first
        weight, scale = weight[0].t(), scale[0].t()
    for name, part, of_part in zip(names, weight.chunk(len(names)), scale.chunk(len(names)), strict=True):
        yield name, _bytes(part)
        yield name + SCALE, _bytes(of_part)


def _exactly(file: BinaryIO, size: int, path: Path) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    read = 0
    while read < size:
        got = file.readinto(view[read:])  # type: ignore[attr-defined]
        if not got:
            raise BadCheckpoint(f"{path} has become shorter since its header was read")
        read += got
    return buffer


def _put(file: BinaryIO, position: int, data: bytes | bytearray | memoryview) -> int:
    file.seek(position)
    file.write(data)
    return len(data)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
