"""Batches of text and pictures, as a processor and a collator give them: padded at the left, or packed."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.commands.subject.vision.families import IMAGE, PAD, VIDEO, WORDS, VisionFamily
from npu_patch.commands.subject.vision.reading import Row, read

PER_TOKEN = ("input_ids", "labels", "mm_token_type_ids", "token_type_ids")


def padded(model: torch.nn.Module, family: VisionFamily, rows: Sequence[Row], *, seed: int = 0) -> dict[str, Tensor]:
    """On the CPU, with a few words around each picture; labels are words alone. What `model` does not take is left
    out."""
    features, placed = read(family, rows)
    generator = torch.Generator().manual_seed(seed)
    pictures = iter(placed)
    sequences = []
    for at, row in enumerate(rows):
        sequence = _words(4 + 2 * at, generator)
        for _ in row:
            sequence += next(pictures) + _words(3, generator)
        sequences.append(sequence + _words(5, generator))
    longest = max(map(len, sequences))
    ids = torch.tensor([[PAD] * (longest - len(each)) + each for each in sequences])
    mask = (ids != PAD).long()
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill((ids < WORDS[0]) | (ids >= WORDS[1]), -100),
        "mm_token_type_ids": types,
        "token_type_ids": types,
        **features,
    }
    taken = inspect.signature(type(model).forward).parameters
    return {name: tensor for name, tensor in given.items() if name in taken}


def _words(count: int, generator: torch.Generator) -> list[int]:
    words: list[int] = torch.randint(*WORDS, (count,), generator=generator).tolist()
    return words


def packed(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sequences of a padded batch behind one another, told by position_ids: those of text before the three of
    multimodal RoPE, where the model has that."""
    kept = batch["attention_mask"].bool()
    text = (batch["attention_mask"].cumsum(-1) - 1)[kept][None]
    behind = {name: batch[name][kept][None] for name in PER_TOKEN if name in batch}
    behind["labels"] = behind["labels"].masked_fill(text == 0, -100)  # no token is to be told by another sequence
    positions = text
    index = getattr(getattr(model, "model", None), "get_rope_index", None)
    if index is not None:
        names = inspect.signature(index).parameters
        rows, _ = index(**{name: tensor for name, tensor in batch.items() if name in names})
        positions = torch.cat([text[None], rows[:, kept][:, None]])
    features = {name: tensor for name, tensor in batch.items() if name not in (*PER_TOKEN, "attention_mask")}
    return {**behind, **features, "position_ids": positions}
