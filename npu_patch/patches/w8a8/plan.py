"""Which parameters of a model are int8: those whose tensors are int8 in the checkpoint, under the names that
transformers' conversions give them. Everything is checked from headers, before anything is loaded."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from npu_patch.checkpoints.folder import Checkpoint
from npu_patch.checkpoints.safetensors_file import BadCheckpoint, Entry
from npu_patch.checkpoints.w8a8 import OFFSET, SCALE, W8A8

STACKED = (MergeModulelist, Concatenate)  # what is done alike to weights and to scales with a dimension of 1


@dataclass(frozen=True)
class Int8Parameter:
    """`scale`: the shape of its scale in the model; `wide`: whether the checkpoint has that in float32."""

    name: str
    scale: tuple[int, ...]
    wide: bool


@dataclass
class _Sources:
    """Of one parameter: by the pattern of a conversion, None where there is none."""

    int8: dict[str | None, list[str]] = field(default_factory=lambda: defaultdict(list))
    floats: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Names:
    """Where the tensors of a checkpoint go in a model."""

    model: Any
    conversions: Sequence[Any]
    there: dict[str, Tensor]

    @classmethod
    def of(cls, model: torch.nn.Module, conversions: Iterable[Any]) -> Names:
        return cls(model, copy.deepcopy(list(conversions)), model.state_dict())  # conversions note what they matched

    @cached_property
    def renamings(self) -> list[Any]:
        return [each for each in self.conversions if isinstance(each, WeightRenaming)]

    @cached_property
    def converters(self) -> list[Any]:
        return [each for each in self.conversions if isinstance(each, WeightConverter)]

    def target(self, name: str) -> tuple[str, str | None]:
        """The parameter's name, and the pattern of the conversion that makes it."""
        kinds = self.renamings, self.converters
        target, pattern = rename_source_key(name, *kinds, self.model.base_model_prefix, self.there)
        if target not in self.there and name in self.there:
            return rename_source_key(name, [], [], self.model.base_model_prefix, self.there)
        return target, pattern

    def converter(self, pattern: str) -> Any:
        return next(each for each in self.converters if pattern in each.source_patterns)


def planned(model: torch.nn.Module, checkpoint: Checkpoint, w8a8: W8A8, names: Names) -> list[Int8Parameter]:
    """
    Raises:
        BadCheckpoint: if what the checkpoint has is not what the model needs.
    """
    sources: dict[str, _Sources] = defaultdict(_Sources)
    scales = {name + SCALE for name in w8a8.weights}
    for name in checkpoint.tensors.keys() - scales:
        target, pattern = names.target(name)
        if name in w8a8.weights:
            sources[target].int8[pattern].append(name)
        else:
            others = [] if pattern is None else names.converter(pattern).target_patterns
            for other in others or [""]:
                sources[target.replace(others[0], other) if others else target].floats.append(name)
    _check_missing(model, checkpoint, sources.keys())
    found = []
    for target, own in sources.items():
        if own.int8 and target in names.there:
            if own.floats:
                first = next(iter(own.int8.values()))[0]
                raise BadCheckpoint(f"{checkpoint.folder}: of {target}, {first} is int8 and {own.floats[0]} is not")
            found.append(_parameter(target, own.int8, checkpoint, w8a8, names))
    return found


def _parameter(
    target: str, int8: Mapping[str | None, list[str]], checkpoint: Checkpoint, w8a8: W8A8, names: Names
) -> Int8Parameter:
    shape, where = tuple(names.there[target].shape), checkpoint.folder
    if None in int8:
        (name,) = int8[None]
        pair = w8a8.weights[name]
        if pair.weight.shape != shape:
            raise BadCheckpoint(f"{where}: {name} is {list(pair.weight.shape)}, and {target} {list(shape)}")
        return Int8Parameter(target, pair.scale.shape, pair.scale.dtype == "F32")
    every = [w8a8.weights[name] for pattern in int8 for name in int8[pattern]]
    converter = names.converter(next(iter(filter(None, int8))))
    if not all(isinstance(each, STACKED) for each in converter.operations) or len(shape) != 3:
        made = ", ".join(type(each).__name__ for each in converter.operations)
        raise BadCheckpoint(f"{where}: {every[0].weight.name} is int8, and {target} is made by {made}")
    rows = 0
    for pattern in converter.source_patterns:
        own = [w8a8.weights[name] for name in int8.get(pattern, ())]
        if len(own) != shape[0]:
            raise BadCheckpoint(f"{where} has {len(own)} of {shape[0]} int8 weights {pattern} for {target}")
        rows += own[0].weight.shape[0]
        _check_alike([pair.weight for pair in own], (own[0].weight.shape[0], shape[2]), checkpoint)
        _check_alike([pair.scale for pair in own], (own[0].weight.shape[0], 1), checkpoint)
    if rows != shape[1]:
        raise BadCheckpoint(f"{where}: {target} {list(shape)} has {rows} rows for each expert")
    return Int8Parameter(target, (*shape[:2], 1), any(pair.scale.dtype == "F32" for pair in every))


def _check_alike(entries: Iterable[Entry], shape: tuple[int, ...], checkpoint: Checkpoint) -> None:
    for each in entries:
        if each.shape != shape:
            raise BadCheckpoint(f"{checkpoint.folder}: {each.name} is {list(each.shape)}, not {list(shape)}")


def _check_missing(model: Any, checkpoint: Checkpoint, there: Iterable[str]) -> None:
    """Matrices of the base model that would be random. A head may be new."""
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    missing = set(_matrices(model)) - set(there) - set(model.all_tied_weights_keys)
    lost = sorted(name for name in missing if name.startswith(prefix))
    if lost:
        raise BadCheckpoint(f"{checkpoint.folder} has no {lost[0]}{f', and {len(lost) - 1} more' * (len(lost) > 1)}")


def _matrices(model: torch.nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and parameter.numel():
            yield name


def check_offsets(checkpoint: Checkpoint, w8a8: W8A8) -> None:
    """That the weights' offsets, which msModelSlim writes, are zero.

    Raises:
        BadCheckpoint: if one is not: such weights are not symmetric.
    """
    offsets = {name + OFFSET for name in w8a8.weights}
    for file, header in checkpoint.shards.items():
        own = [entry for entry in header.entries if entry.name in offsets]
        if own:
            with (checkpoint.folder / file).open("rb") as read:
                for entry in own:
                    read.seek(entry.start)
                    if any(read.read(entry.size)):
                        raise BadCheckpoint(f"{checkpoint.folder / file}: {entry.name} is not zero everywhere")


def check_scales(w8a8: W8A8, names: Names) -> None:
    """That the scales go where their weights go, by conversions that know of them.

    Raises:
        BadCheckpoint: if transformers renames a weight and not its scale.
    """
    for name, pair in w8a8.weights.items():
        weight, scale = names.target(name)[0], names.target(pair.scale.name)[0]
        if weight in names.there and scale != weight + SCALE:
            raise BadCheckpoint(f"{pair.scale.name} would be loaded as {scale}, and its weight as {weight}")
