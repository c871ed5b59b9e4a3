"""Headers of safetensors files are believed only where they describe the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from npu_patch.checkpoints.safetensors_file import BadCheckpoint, header_of, laid_out

TENSORS = {"b": torch.arange(6.0).view(2, 3).bfloat16(), "a": torch.arange(5, dtype=torch.int8), "empty": torch.ones(0)}


def rewritten(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def file(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return file


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "truncated or no safetensors file"),
    "within its header": (lambda data: data[:40], "truncated or no safetensors file"),
    "within a tensor": (lambda data: data[:-3], "is truncated: 3 of its"),
    "longer": (lambda data: data + b"xy", "2 bytes beyond its last tensor"),
    "no JSON": (lambda data: data[:8] + b"?" + data[9:], "no header of JSON"),
    "a hole": (rewritten(lambda header: header.pop("b")), "was expected"),
    "another shape": (rewritten(lambda header: header["b"].update(shape=[2, 4])), "takes 16 bytes"),
    "a dtype of tomorrow": (rewritten(lambda header: header["b"].update(dtype="F3")), "dtype F3; known are F64"),
    "a negative size": (rewritten(lambda header: header["b"].update(shape=[-2, -3])), "takes 12 bytes"),
    "half a description": (rewritten(lambda header: header["b"].pop("shape")), "is described by"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(case: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    change, words = BROKEN[case]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BadCheckpoint) as refused:
        header_of(path)
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_what_safetensors_wrote_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x", metadata={"format": "pt"})
    header = header_of(tmp_path / "x")
    assert {entry.name: (entry.dtype, entry.shape) for entry in header.entries} == {
        "b": ("BF16", (2, 3)), "a": ("I8", (5,)), "empty": ("F32", (0,)),
    }  # fmt: skip
    assert header.metadata == {"format": "pt"}
    data = (tmp_path / "x").read_bytes()
    for entry in header.entries:
        assert data[entry.start : entry.start + entry.size] == TENSORS[entry.name].view(torch.uint8).numpy().tobytes()


def test_what_is_laid_out_is_read_by_safetensors_and_is_aligned(tmp_path: Path) -> None:
    tensors = [("odd", "I8", (5,)), ("half", "BF16", (2, 3)), ("wide", "F32", (3,))]
    first, header = laid_out(tensors, {"format": "pt"})
    (tmp_path / "x").write_bytes(first + bytes(header.size - len(first)))
    assert header_of(tmp_path / "x") == header
    assert {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "x").items()} == {
        name: shape for name, _, shape in tensors
    }
    assert all(entry.start % {"I8": 1, "BF16": 2, "F32": 4}[entry.dtype] == 0 for entry in header.entries)
