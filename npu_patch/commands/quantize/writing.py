"""Carries a plan out: shards, then what stands beside them, config.json and the manifest last.

Until config.json is there, nothing takes the folder for a model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npu_patch.checkpoints.folder import CONFIG
from npu_patch.checkpoints.w8a8 import ASCEND, DESCRIPTION, OFFSET, SCALE, config_of, description_of
from npu_patch.commands.quantize.plan import Plan, index_of, int8_names
from npu_patch.commands.quantize.progress import Progress
from npu_patch.commands.quantize.shard import Written, sha256_of, write_shard

MANIFEST = "quantize_manifest.json"
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
            written = write_shard(source, progress.part, shard, plan.selection, done)
            progress.finish(shard.name, written)
        hashes[shard.name] = written
    _write_beside(plan, progress, hashes)
    return Outcome(tuple(kept), tuple(damaged))


def _write_beside(plan: Plan, progress: Progress, hashes: dict[str, Written]) -> None:
    output, folder = progress.output, plan.checkpoint.folder
    files = {name: written.target for name, written in hashes.items()}
    sources = {name: written.source for name, written in hashes.items()}
    for name in plan.checkpoint.other_files():
        if name in (DESCRIPTION, MANIFEST):
            continue
        shutil.copyfile(folder / name, progress.part)
        progress.put(name)
        files[name] = sources[name] = sha256_of(output / name)
    index = index_of(plan)
    made = dict([index] if index else [])
    if plan.kind == ASCEND:
        made[DESCRIPTION] = _description(plan)
    made[CONFIG] = _config(plan)
    for name, content in made.items():
        progress.part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        progress.put(name)
        files[name] = sha256_of(output / name)
    sources[CONFIG] = sha256_of(folder / CONFIG)
    manifest = {"settings": plan.settings, "source": sources, "files": files}
    progress.part.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    progress.put(MANIFEST)
    progress.end()


def _config(plan: Plan) -> dict[str, Any]:
    config = dict(plan.checkpoint.config)
    if plan.kind != ASCEND:
        config["quantization_config"] = config_of(plan.selection.ignored)
    return config


def _description(plan: Plan) -> dict[str, Any]:
    parts = {name + ending for name in int8_names(plan) for ending in ("", SCALE, OFFSET)}
    return description_of({entry.name: entry.name in parts for shard in plan.shards for entry in shard.target.entries})
