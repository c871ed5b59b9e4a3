"""All that will be written, known before anything is: which shard has what where, and what that depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from npu_patch.checkpoints.folder import CONFIG, INDEX, ONE_FILE, Checkpoint
from npu_patch.checkpoints.safetensors_file import Entry, Header, laid_out
from npu_patch.checkpoints.w8a8 import SCALE

WRITER = 1  # of what is written; another number is another plan
TOKENS_OF_CHANGE = ("st_size", "st_mtime_ns")


class Change(Protocol):
    """What a copy has in place of a checkpoint's tensors. `settings`: two changes with the same ones write the same;
    `manifest`: the name of the file with the hashes."""

    @property
    def settings(self) -> Mapping[str, Any]: ...

    @property
    def manifest(self) -> str: ...

    def tensors(self, entry: Entry) -> Iterable[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of each that stands for that one."""

    def pieces(self, entry: Entry) -> Iterable[torch.Size]:
        """Shapes in which it is read."""

    def written(
        self, entry: Entry, number: int, piece: bytearray, shape: torch.Size
    ) -> Iterable[tuple[str, bytearray | memoryview]]:
        """What the piece of that number adds to which tensors.

        Raises:
            ValueError: what is wrong with it, as the end of a sentence that begins with its name.
        """

    def files(self, plan: Plan) -> Mapping[str, Mapping[str, Any]]:
        """Those of JSON that are made anew, config.json last."""


@dataclass(frozen=True)
class Shard:
    """`first_bytes`: of the file that is written, up to its tensors."""

    name: str
    source: Header
    first_bytes: bytes
    target: Header


@dataclass(frozen=True)
class Plan:
    checkpoint: Checkpoint
    change: Change
    shards: tuple[Shard, ...]

    def size(self) -> int:
        """Bytes of what is written, but for a few of JSON."""
        others = sum((self.checkpoint.folder / name).stat().st_size for name in self.checkpoint.other_files())
        return others + sum(shard.target.size for shard in self.shards)

    def fingerprint(self) -> dict[str, Any]:
        """Two runs with the same one write the same bytes: by it, one goes on where another was interrupted."""
        folder = self.checkpoint.folder
        files = [CONFIG, *self.checkpoint.other_files(), *(shard.name for shard in self.shards)]
        stats = {name: (folder / name).stat() for name in files}
        changes = {name: [getattr(stat, each) for each in TOKENS_OF_CHANGE] for name, stat in stats.items()}
        layout = hashlib.sha256(b"".join(shard.first_bytes for shard in self.shards)).hexdigest()
        return {"settings": dict(self.change.settings), "files of the model": changes, "layout": layout}


def plan_for(checkpoint: Checkpoint, change: Change) -> Plan:
    shards = []
    for name, source in checkpoint.shards.items():
        tensors = [each for entry in source.entries for each in change.tensors(entry)]
        first_bytes, target = laid_out(tensors, {**source.metadata, "format": "pt"})
        shards.append(Shard(name, source, first_bytes, target))
    return Plan(checkpoint, change, tuple(shards))


def int8_names(plan: Plan) -> set[str]:
    written = {entry.name: entry.dtype for shard in plan.shards for entry in shard.target.entries}
    return {name for name, dtype in written.items() if dtype == "I8" and name + SCALE in written}


def index_of(plan: Plan) -> tuple[str, dict[str, Any]] | None:
    """The index's name and content, where there is more than one file of a fixed name."""
    if len(plan.shards) == 1 and plan.shards[0].name == ONE_FILE:
        return None
    weight_map = {entry.name: shard.name for shard in plan.shards for entry in shard.target.entries}
    total = sum(entry.size for shard in plan.shards for entry in shard.target.entries)
    return INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
