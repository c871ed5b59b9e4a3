"""All that will be written, known before anything is: which shard has what where, and what that depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npu_patch.checkpoints.folder import CONFIG, INDEX, ONE_FILE, Checkpoint
from npu_patch.checkpoints.safetensors_file import Entry, Header, laid_out
from npu_patch.checkpoints.w8a8 import ASCEND, OFFSET, SCALE
from npu_patch.commands.quantize.selection import Selected, Selection

WRITER = 1  # of what is written; another number is another plan
TOKENS_OF_CHANGE = ("st_size", "st_mtime_ns")


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
    selection: Selection
    kind: str
    shards: tuple[Shard, ...]
    settings: Mapping[str, Any]

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
        return {"settings": dict(self.settings), "files of the model": changes, "layout": layout}


def plan_for(
    checkpoint: Checkpoint, selection: Selection, kind: str, ignore: Sequence[str], also: Sequence[str]
) -> Plan:
    shards = []
    for name, source in checkpoint.shards.items():
        tensors = [each for entry in source.entries for each in _written(entry, selection, kind)]
        first_bytes, target = laid_out(tensors, {**source.metadata, "format": "pt"})
        shards.append(Shard(name, source, first_bytes, target))
    apart = any(each.apart for each in selection.selected.values())
    settings = {"writer": WRITER, "format": kind, "ignore": list(ignore), "also": list(also), "apart": apart}
    return Plan(checkpoint, selection, kind, tuple(shards), settings)


def _written(entry: Entry, selection: Selection, kind: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """What stands for a tensor: itself, or int8 with its scale."""
    chosen = selection.selected.get(entry.name)
    if chosen is None:
        yield entry.name, entry.dtype, entry.shape
        return
    for name, shape in _matrices(chosen):
        summed_over = len(shape) - 1 if chosen.apart else chosen.summed_over
        scale = tuple(1 if i == summed_over else size for i, size in enumerate(shape))
        yield name, "I8", shape
        for ending in (SCALE, OFFSET) if kind == ASCEND else (SCALE,):
            yield name + ending, entry.dtype, scale


def _matrices(chosen: Selected) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what one tensor becomes."""
    entry = chosen.entry
    if not chosen.apart:
        yield entry.name, entry.shape
        return
    outputs, inputs = entry.shape[3 - chosen.summed_over], entry.shape[chosen.summed_over]
    for expert in range(entry.shape[0]):
        for name in chosen.names(expert):
            yield name, (outputs // len(chosen.apart), inputs)


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
