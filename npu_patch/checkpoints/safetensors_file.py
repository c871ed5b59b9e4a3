"""safetensors files, read and written a piece at a time: headers are checked against the file before anything is read.

The format: 8 bytes with the header's length, the header in JSON (name -> dtype, shape, offsets), the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}
FLOATS: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
LONGEST_HEADER = 100_000_000  # what the format allows
LENGTH_BYTES = 8


class BadCheckpoint(ValueError):
    """A checkpoint that cannot be read as what it claims to be; the message names the file and what is wrong."""


@dataclass(frozen=True)
class Entry:
    """A tensor in a file. `start`: the file's first byte of it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Header:
    """Entries in the order in which they lie, which is without gaps from `start` on."""

    entries: tuple[Entry, ...]
    metadata: Mapping[str, str]
    start: int
    size: int
    """Bytes of the whole file."""


def header_of(path: Path) -> Header:
    """
    Raises:
        BadCheckpoint: if the file is truncated, or its header does not describe it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = LENGTH_BYTES + int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES or start > min(size, LONGEST_HEADER):
                raise BadCheckpoint(f"{path} is truncated or no safetensors file: {size} bytes, a header up to {start}")
            described = json.loads(file.read(start - LENGTH_BYTES))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, BadCheckpoint):
            raise
        raise BadCheckpoint(f"{path} has no header of JSON: {error}") from error
    if not isinstance(described, dict):
        raise BadCheckpoint(f"{path} has a header that is no object")
    metadata = described.pop("__metadata__", None) or {}
    entries = sorted((_entry(path, name, fields, start) for name, fields in described.items()), key=_place)
    end = start
    for entry in entries:
        if entry.start != end:
            raise BadCheckpoint(f"{path}: {entry.name} lies at byte {entry.start}, where {end} was expected")
        end += entry.size
    if end > size:
        raise BadCheckpoint(f"{path} is truncated: {end - size} of its {end} bytes are missing")
    if end < size:
        raise BadCheckpoint(f"{path} has {size - end} bytes beyond its last tensor")
    return Header(tuple(entries), metadata, start, size)


def _place(entry: Entry) -> tuple[int, int, str]:
    return entry.start, entry.size, entry.name


def _entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        sound = all(type(each) is int and each >= 0 for each in (*shape, begin, end))
    except (KeyError, TypeError, ValueError) as error:
        raise BadCheckpoint(f"{path}: {name} is described by {fields!r}") from error
    if dtype not in ITEM_BYTES:
        raise BadCheckpoint(f"{path}: {name} has the dtype {dtype}; known are {', '.join(ITEM_BYTES)}")
    entry = Entry(name, dtype, shape, start + begin)
    if not sound or entry.size != end - begin:
        raise BadCheckpoint(f"{path}: {name}, {dtype} {list(shape)}, takes {entry.size} bytes, not {begin} to {end}")
    return entry


def laid_out(tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> tuple[bytes, Header]:
    """The first bytes of a file with these tensors (name, dtype, shape), and where each will lie: wide dtypes first, so
    that all are aligned, in the given order otherwise."""
    ordered = sorted(tensors, key=lambda each: -ITEM_BYTES[each[1]])
    described: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    places, end = [], 0
    for name, dtype, shape in ordered:
        entry = Entry(name, dtype, shape, end)
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + entry.size]}
        places.append(entry)
        end += entry.size
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    start = LENGTH_BYTES + len(text)
    entries = tuple(Entry(each.name, each.dtype, each.shape, start + each.start) for each in places)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text, Header(entries, metadata, start, start + end)
