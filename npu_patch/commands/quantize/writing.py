"""Carries a plan out: shards, then what stands beside them, config.json and the manifest last.

Until config.json is there, nothing takes the folder for a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass

from npu_patch.checkpoints.folder import CONFIG
from npu_patch.checkpoints.w8a8 import DESCRIPTION
from npu_patch.commands.quantize.plan import Plan, index_of
from npu_patch.commands.quantize.progress import Progress
from npu_patch.commands.quantize.shard import Written, sha256_of, write_shard

MANIFESTS = ("quantize_manifest.json", "dequantize_manifest.json")
Done = Callable[[int], None]


@dataclass(frozen=True)
class Outcome:
    """`kept`: shards that an interrupted run had finished."""

    kept: tuple[str, ...]
    damaged: tuple[str, ...]


def write(plan: Plan, progress: Progress, done: Done) -> Outcome:
    """Raises `OSError` where something cannot be written; what is finished stays."""
    kept, damaged = [], []
    hashes: dict[str, Written] = {}
    for shard in plan.shards:
        written = progress.done(shard.name)
        if written is not None and sha256_of(progress.output / shard.name) == written.target:
            kept.append(shard.name)
            done(shard.source.size - shard.source.start)
        else:
            damaged += [shard.name] if written is not None else []
            source = plan.checkpoint.folder / shard.name
            written = write_shard(source, progress.part, shard, plan.change, done)
            progress.finish(shard.name, written)
        hashes[shard.name] = written
    _write_beside(plan, progress, hashes)
    return Outcome(tuple(kept), tuple(damaged))


def _write_beside(plan: Plan, progress: Progress, hashes: dict[str, Written]) -> None:
    output, folder = progress.output, plan.checkpoint.folder
    files = {name: written.target for name, written in hashes.items()}
    sources = {name: written.source for name, written in hashes.items()}
    for name in plan.checkpoint.other_files():
        if name in (DESCRIPTION, *MANIFESTS):
            continue
        shutil.copyfile(folder / name, progress.part)
        progress.put(name)
        files[name] = sources[name] = sha256_of(output / name)
    index = index_of(plan)
    made = dict([index] if index else []) | dict(plan.change.files(plan))
    for name, content in made.items():
        progress.part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        progress.put(name)
        files[name] = sha256_of(output / name)
    sources[CONFIG] = sha256_of(folder / CONFIG)
    manifest = {"settings": plan.change.settings, "source": sources, "files": files}
    progress.part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    progress.put(plan.change.manifest)
    progress.end()
