"""What stands for each tensor of a checkpoint when it is quantised: itself, or int8 with scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npu_patch.checkpoints.folder import CONFIG
from npu_patch.checkpoints.safetensors_file import FLOATS, Entry
from npu_patch.checkpoints.w8a8 import ASCEND, DESCRIPTION, OFFSET, SCALE, config_of, description_of
from npu_patch.commands.quantize.int8 import WIDER, int8_of
from npu_patch.commands.quantize.pieces import in_pieces
from npu_patch.commands.quantize.plan import WRITER, Plan, int8_names
from npu_patch.commands.quantize.selection import Selected, Selection

MANIFEST = "quantize_manifest.json"


@dataclass(frozen=True)
class Quantising:
    selection: Selection
    kind: str
    ignore: Sequence[str]
    also: Sequence[str]
    manifest: str = MANIFEST

    @property
    def settings(self) -> Mapping[str, Any]:
        apart = any(each.apart for each in self.selection.selected.values())
        given = {"ignore": list(self.ignore), "also": list(self.also)}
        return {"writer": WRITER, "format": self.kind, **given, "apart": apart}

    def tensors(self, entry: Entry) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        chosen = self.selection.selected.get(entry.name)
        if chosen is None:
            yield entry.name, entry.dtype, entry.shape
            return
        for name, shape in _matrices(chosen):
            summed_over = len(shape) - 1 if chosen.apart else chosen.summed_over
            scale = tuple(1 if i == summed_over else size for i, size in enumerate(shape))
            yield name, "I8", shape
            for ending in (SCALE, OFFSET) if self.kind == ASCEND else (SCALE,):
                yield name + ending, "F32" if FLOATS[entry.dtype] in WIDER else entry.dtype, scale

    def pieces(self, entry: Entry) -> Iterator[torch.Size]:
        """Whole channels of a weight."""
        chosen = self.selection.selected.get(entry.name)
        if chosen is None:
            return in_pieces(entry)
        rows_last = chosen.summed_over == len(entry.shape) - 1
        row = torch.Size(entry.shape[-1:] if rows_last else entry.shape[1:])
        if not chosen.apart:
            return in_pieces(entry, row)
        return in_pieces(entry, row, entry.shape[1] if rows_last else 1)  # an expert at a time

    def written(
        self, entry: Entry, number: int, piece: bytearray, shape: torch.Size
    ) -> Iterator[tuple[str, bytearray | memoryview]]:
        chosen = self.selection.selected.get(entry.name)
        if chosen is None:
            yield entry.name, piece
            return
        values = torch.frombuffer(piece, dtype=FLOATS[entry.dtype]).view(shape)
        try:
            weight, scale = int8_of(values, 1)
        except ValueError as error:
            raise ValueError(f"cannot be quantised: {error}") from error
        names = chosen.names(number) or [entry.name]
        if chosen.apart and len(shape) == 3:  # an expert whose inputs come first
            weight, scale = weight[0].t(), scale[0].t()
        for name, part, of_part in zip(names, weight.chunk(len(names)), scale.chunk(len(names)), strict=True):
            yield name, bytes_of(part)
            yield name + SCALE, bytes_of(of_part)

    def files(self, plan: Plan) -> dict[str, Mapping[str, Any]]:
        config = plan.checkpoint.config
        if self.kind != ASCEND:
            return {CONFIG: {**config, "quantization_config": config_of(self.selection.ignored)}}
        parts = {name + ending for name in int8_names(plan) for ending in ("", SCALE, OFFSET)}
        written = [entry.name for shard in plan.shards for entry in shard.target.entries]
        return {DESCRIPTION: description_of({name: name in parts for name in written}), CONFIG: config}


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


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
