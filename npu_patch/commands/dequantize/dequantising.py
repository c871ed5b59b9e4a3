"""What stands for each tensor of a W8A8 checkpoint in a plain one: int8 times its scale, or itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from npu_patch.checkpoints.folder import CONFIG, Checkpoint
from npu_patch.checkpoints.safetensors_file import FLOATS, Entry
from npu_patch.checkpoints.w8a8 import OFFSET, SCALE, W8A8, Int8Weight
from npu_patch.commands.quantize.pieces import VALUE, in_pieces, rows_at_once
from npu_patch.commands.quantize.plan import WRITER, Plan
from npu_patch.commands.quantize.quantising import bytes_of

MANIFEST = "dequantize_manifest.json"
NAMES = {"bfloat16": "BF16", "float16": "F16"}  # of dtypes, in configurations


@dataclass(frozen=True)
class Dequantising:
    """A product is rounded once, to the scale's dtype; where that is float32, to the 16-bit dtype of the model."""

    checkpoint: Checkpoint
    w8a8: W8A8
    manifest: str = MANIFEST
    settings: Mapping[str, Any] = field(default_factory=lambda: {"writer": WRITER, "dequantised": True})

    def tensors(self, entry: Entry) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        found = self.w8a8.weights.get(entry.name)
        if found is not None:
            yield entry.name, self._dtype(found), entry.shape
        elif not self._is_beside(entry):
            yield entry.name, entry.dtype, entry.shape

    def pieces(self, entry: Entry) -> Iterator[torch.Size]:
        found = self.w8a8.weights.get(entry.name)
        return in_pieces(entry, VALUE if found is None else _row(found))

    def written(
        self, entry: Entry, number: int, piece: bytearray, shape: torch.Size
    ) -> Iterator[tuple[str, bytearray | memoryview]]:
        found = self.w8a8.weights.get(entry.name)
        if found is not None:
            weight = torch.frombuffer(piece, dtype=torch.int8).view(shape)
            first = number * rows_at_once(entry, _row(found))
            scale = self._scale(found)[first : first + len(weight)]
            yield entry.name, bytes_of((weight.float() * scale.float()).to(FLOATS[self._dtype(found)]))
        elif not self._is_beside(entry):
            yield entry.name, piece
        elif entry.name.endswith(OFFSET) and bool(torch.frombuffer(piece, dtype=FLOATS[entry.dtype]).any()):
            raise ValueError("is not zero everywhere: the weight is not symmetric")

    def files(self, plan: Plan) -> dict[str, Mapping[str, Any]]:
        return {CONFIG: _plain(self.checkpoint.config)}

    def _is_beside(self, entry: Entry) -> bool:
        base = entry.name.removesuffix(SCALE).removesuffix(OFFSET)
        return base != entry.name and base in self.w8a8.weights

    @cached_property
    def _files(self) -> dict[str, str]:
        return {entry.name: name for name, header in self.checkpoint.shards.items() for entry in header.entries}

    @cached_property
    def _of_model(self) -> str:
        config = self.checkpoint.config
        parts = (config, config.get("text_config") or {})
        named = [part.get(name) for part in parts for name in ("dtype", "torch_dtype")]
        return next((NAMES[each] for each in named if each in NAMES), "F32")

    def _dtype(self, found: Int8Weight) -> str:
        return self._of_model if found.scale.dtype == "F32" else found.scale.dtype

    def _scale(self, found: Int8Weight) -> Tensor:
        """As many rows as the weight has, each for one of `_row`. It may lie in another shard."""
        entry = found.scale
        with (self.checkpoint.folder / self._files[entry.name]).open("rb") as file:
            file.seek(entry.start)
            values = torch.frombuffer(bytearray(file.read(entry.size)), dtype=FLOATS[entry.dtype])
        row = _row(found)
        return values.view(-1, *(1 for _ in row)) if len(row) == 1 else values.view(-1, *entry.shape[1:])


def _row(found: Int8Weight) -> torch.Size:
    """What shares a scale; of packed experts whose inputs come first, an expert."""
    inputs_last = len(found.scale.shape) == 1 or found.scale.shape[-1] == 1
    return torch.Size(found.weight.shape[-1:] if inputs_last else found.weight.shape[1:])


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    return plain | {key: _plain(value) for key, value in plain.items() if key == "text_config"}
