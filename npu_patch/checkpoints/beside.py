"""Tensors put beside those of a model's folder, or in the place of those of the same names there.

A file that is there stays whole until the one that takes its place is written.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from npu_patch.checkpoints.folder import INDEX, ONE_FILE, Checkpoint, checkpoint_in, json_of
from npu_patch.checkpoints.safetensors_file import FLOATS, BadCheckpoint

NAMES = {dtype: name for name, dtype in FLOATS.items()}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_beside(folder: Path, tensors: Mapping[str, torch.Tensor], shard: str) -> list[str]:
    """The files that were written: of tensors that are there the shards that have them, of new ones a shard `shard`
    and the index. A model of one file becomes one of two shards.

    Raises:
        BadCheckpoint: if some are there and others are not, or in other shapes or dtypes.
    """
    checkpoint = checkpoint_in(folder)
    there = checkpoint.tensors
    known = [name for name in tensors if name in there]
    if not known:
        return _added(checkpoint, tensors, shard)
    lacking = [name for name in tensors if name not in there]
    if lacking:
        raise BadCheckpoint(f"{folder} has {known[0]}, but no {lacking[0]}: {len(lacking)} of {len(tensors)} are new")
    for name, tensor in tensors.items():
        found, given = (there[name].dtype, there[name].shape), (NAMES.get(tensor.dtype), tuple(tensor.shape))
        if found != given:
            raise BadCheckpoint(f"{folder} has {name} as {found[0]} {list(found[1])}, not {given[0]} {list(given[1])}")
    return [name for name in checkpoint.shards if _replaced(checkpoint, name, tensors)]


def _replaced(checkpoint: Checkpoint, shard: str, tensors: Mapping[str, torch.Tensor]) -> bool:
    entries = [entry for entry in checkpoint.shards[shard].entries if entry.name in tensors]
    if entries:
        part = checkpoint.folder / f"{shard}.part"
        shutil.copyfile(checkpoint.folder / shard, part)
        with part.open("r+b") as file:
            for entry in entries:
                file.seek(entry.start)
                file.write(
                    tensors[entry.name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                )
        part.replace(checkpoint.folder / shard)
    return bool(entries)


def _added(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor], shard: str) -> list[str]:
    from safetensors.torch import save_file

    folder, one = checkpoint.folder, [*checkpoint.shards] == [ONE_FILE]
    shard = SECOND if one else shard
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / f"{shard}.part", metadata={"format": "pt"})
    (folder / f"{shard}.part").replace(folder / shard)
    if one:
        os.link(folder / ONE_FILE, folder / FIRST)
        weights = dict.fromkeys(checkpoint.tensors, FIRST)
        index: dict[str, Any] = {"metadata": {"total_size": sum(entry.size for entry in checkpoint.tensors.values())}}
    else:
        index = json_of(folder / INDEX)
        weights = index["weight_map"]
    total = index.setdefault("metadata", {}).get("total_size")
    if isinstance(total, int):
        index["metadata"]["total_size"] = total + sum(each.nbytes for each in plain.values())
    index["weight_map"] = {**weights, **dict.fromkeys(plain, shard)}
    (folder / f"{INDEX}.part").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    (folder / f"{INDEX}.part").replace(folder / INDEX)
    if one:
        (folder / ONE_FILE).unlink()
    return [shard, INDEX]
