"""A model's folder: its configuration and its shards. A cache of the hub, whose files are links, is one too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.safetensors_file import BadCheckpoint, Entry, Header, header_of

CONFIG = "config.json"
ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
WEIGHTS = (".safetensors", INDEX_ENDING, ".bin", ".bin.index.json", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class Checkpoint:
    """`shards`: file name -> header, in the order of their names."""

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Header]

    @cached_property
    def tensors(self) -> dict[str, Entry]:
        return {entry.name: entry for header in self.shards.values() for entry in header.entries}

    def other_files(self) -> list[str]:
        """What stands beside the weights: tokenizer, templates, code. Without folders, hidden files, config.json."""
        return sorted(
            path.name
            for path in self.folder.iterdir()
            if path.is_file() and not path.name.startswith(".") and path.name != CONFIG
            if not path.name.endswith(WEIGHTS)
        )


def checkpoint_in(folder: Path) -> Checkpoint:
    """Reads headers only.

    Raises:
        BadCheckpoint: if something is missing, truncated, or not as the index says.
    """
    config = json_of(folder / CONFIG)
    indices = sorted(path.name for path in folder.iterdir() if path.name.endswith(INDEX_ENDING))
    if INDEX in indices or (indices and not (folder / ONE_FILE).is_file()):
        return Checkpoint(folder, config, _shards(folder, INDEX if INDEX in indices else indices[0]))
    files = sorted(path.name for path in folder.iterdir() if path.name.endswith(".safetensors"))
    if ONE_FILE in files or len(files) == 1:
        name = ONE_FILE if ONE_FILE in files else files[0]
        return Checkpoint(folder, config, {name: header_of(folder / name)})
    found = f"there are {', '.join(files[:3])}" if files else "there is no file in safetensors"
    raise BadCheckpoint(f"{folder} has neither {ONE_FILE} nor an index of shards ({INDEX}): {found}")


def _shards(folder: Path, index: str) -> dict[str, Header]:
    weight_map = json_of(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadCheckpoint(f"{folder / index} has no weight_map")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise BadCheckpoint(f"{folder / index} names {name}, which is not in the folder")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BadCheckpoint(f"{folder} lacks {', '.join(missing[:3])}, of {len(names)} shards in {index}")
    shards = {name: header_of(folder / name) for name in names}
    there = {entry.name: name for name, header in shards.items() for entry in header.entries}
    if sum(len(header.entries) for header in shards.values()) != len(there):
        raise BadCheckpoint(f"{folder} has a tensor of one name in two shards")
    lost = sorted(tensor for tensor, name in weight_map.items() if there.get(tensor) != name)
    if lost:
        raise BadCheckpoint(f"{folder / weight_map[lost[0]]} has no {lost[0]}, which {index} says it has")
    return shards


def json_of(path: Path) -> dict[str, Any]:
    """
    Raises:
        BadCheckpoint: if there is no such file, or no JSON object in it.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise BadCheckpoint(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadCheckpoint(f"{path} is no JSON object")
    return content
