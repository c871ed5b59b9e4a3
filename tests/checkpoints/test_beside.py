"""Tensors put beside a model's, or in the place of those of the same names: what is there stays readable and whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npu_patch.checkpoints.beside import write_beside
from npu_patch.checkpoints.folder import INDEX, checkpoint_in
from npu_patch.checkpoints.safetensors_file import BadCheckpoint

OWN = {"a.weight": torch.arange(6.0).view(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
NEW = {"mtp.fc.weight": torch.full((2, 2), 3.0), "mtp.norm.weight": torch.arange(4, dtype=torch.bfloat16)}


def made(folder: Path, shards: int) -> Path:
    (folder / "config.json").write_text("{}")
    if shards == 1:
        save_file(OWN, folder / "model.safetensors", {"format": "pt"})
        return folder
    for name, tensor in OWN.items():
        save_file({name: tensor}, folder / f"{name}.safetensors", {"format": "pt"})
    index = {"metadata": {"total_size": 32}, "weight_map": {name: f"{name}.safetensors" for name in OWN}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def read(folder: Path) -> dict[str, Tensor]:
    """As anybody reads a checkpoint of shards."""
    checkpoint = checkpoint_in(folder)
    found: dict[str, Tensor] = {}
    for shard in checkpoint.shards:
        found |= load_file(folder / shard)
    return found


@pytest.mark.parametrize("shards", [1, 2])
def test_new_tensors_are_a_shard_of_their_own(shards: int, tmp_path: Path) -> None:
    files = write_beside(made(tmp_path, shards), NEW, "mtp.safetensors")
    found = read(tmp_path)
    assert found.keys() == OWN.keys() | NEW.keys()
    assert all(torch.equal(found[name], each) for name, each in (OWN | NEW).items())
    assert all((tmp_path / name).is_file() for name in files) and not list(tmp_path.glob("*.part"))
    assert json.loads((tmp_path / INDEX).read_text())["metadata"]["total_size"] == 32 + 24
    assert (tmp_path / "model.safetensors").exists() is False  # which loaders would take before an index


@pytest.mark.parametrize("shards", [1, 2])
def test_tensors_of_the_same_names_are_replaced_where_they_lie(shards: int, tmp_path: Path) -> None:
    write_beside(made(tmp_path, shards), NEW, "mtp.safetensors")
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    changed = {name: each + 1 for name, each in NEW.items()} | {"b.weight": OWN["b.weight"] * 2}
    files = write_beside(tmp_path, changed, "other.safetensors")
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before
    assert len(files) == 2 and all(torch.equal(read(tmp_path)[name], each) for name, each in changed.items())
    assert torch.equal(read(tmp_path)["a.weight"], OWN["a.weight"])


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"a.weight": OWN["a.weight"], "c.weight": torch.ones(1)}, r"has a.weight, but no c.weight: 1 of 2 are new"),
        ({"a.weight": torch.ones(3, 2)}, r"has a.weight as F32 \[2, 3\], not F32 \[3, 2\]"),
        ({"a.weight": torch.ones(2, 3).half()}, r"has a.weight as F32 \[2, 3\], not F16 \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_an_error_and_nothing_is_written(
    tensors: dict[str, Tensor], words: str, tmp_path: Path
) -> None:
    made(tmp_path, 1)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(BadCheckpoint, match=words):
        write_beside(tmp_path, tensors, "mtp.safetensors")
    assert (tmp_path / "model.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 2
