"""Writes one shard, a piece of a tensor at a time: memory is a few pieces, however large the shard is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from npu_patch.checkpoints.safetensors_file import ITEM_BYTES, BadCheckpoint
from npu_patch.commands.quantize.pieces import PIECE
from npu_patch.commands.quantize.plan import Change, Shard


@dataclass(frozen=True)
class Written:
    """SHA-256 of the shard that was read and of the one that was written."""

    source: str
    target: str


def write_shard(
    source: Path, to: Path, shard: Shard, change: Change, done: Callable[[int], None] = lambda size: None
) -> Written:
    """The file is on the disk, whole, when this returns. `done`: called with the bytes that were read.

    Raises:
        BadCheckpoint: if a tensor cannot be changed so, or the source is not any more what its header said.
        OSError: if it cannot be written.
    """
    places = {entry.name: entry.start for entry in shard.target.entries}
    with source.open("rb") as read, to.open("w+b") as write:
        hashed = hashlib.sha256()
        hashed.update(_exactly(read, shard.source.start, source))
        write.write(shard.first_bytes)
        write.truncate(shard.target.size)  # what is not written below, offsets, is zero
        for entry in shard.source.entries:
            for number, shape in enumerate(change.pieces(entry)):
                piece = _exactly(read, shape.numel() * ITEM_BYTES[entry.dtype], source)
                hashed.update(piece)
                try:
                    for name, data in change.written(entry, number, piece, shape):
                        places[name] += _put(write, places[name], data)
                except ValueError as error:
                    raise BadCheckpoint(f"{source}: {entry.name} {error}") from error
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
