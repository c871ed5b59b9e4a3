"""Which weights of a checkpoint are int8 with dynamic int8 activations, and where their scales are.

Two descriptions say so: `quantization_config` in config.json (compressed-tensors, "int-quantized"), and
`quant_model_description.json` (msModelSlim, AscendV1, "W8A8_DYNAMIC"). Both keep a weight as int8 `NAME` beside
`NAME_scale`, one for each output channel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npu_patch.checkpoints.folder import Checkpoint, json_of
from npu_patch.checkpoints.safetensors_file import BadCheckpoint, Entry

DESCRIPTION = "quant_model_description.json"
COMPRESSED_TENSORS, ASCEND = "compressed-tensors", "ascend"
FORMAT = "int-quantized"
DYNAMIC, FLOAT = "W8A8_DYNAMIC", "FLOAT"
SCALE, OFFSET = "_scale", "_offset"
SCALE_DTYPES = ("F32", "BF16", "F16")
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


@dataclass(frozen=True)
class Int8Weight:
    """`scale.shape` is the weight's with one dimension of 1: that over which an output channel is summed."""

    weight: Entry
    scale: Entry


@dataclass(frozen=True)
class W8A8:
    """`weights`: name of the tensor -> it and its scale. `ignored`: as the description names what is no int8."""

    described_by: str
    weights: Mapping[str, Int8Weight]
    ignored: tuple[str, ...]


def config_of(ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` for linear layers with int8 weights, all but those."""
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS, "output_activations": None}
    return {
        "quant_method": COMPRESSED_TENSORS,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def description_of(tensors: Mapping[str, bool]) -> dict[str, Any]:
    """`quant_model_description.json` of tensors, each with whether it belongs to an int8 weight."""
    return {"model_quant_type": DYNAMIC, "version": "1.0.0"} | {
        name: DYNAMIC if quantised else FLOAT for name, quantised in sorted(tensors.items())
    }


def w8a8_in(checkpoint: Checkpoint) -> W8A8 | None:
    """What the checkpoint says of itself; None where it says nothing.

    Raises:
        BadCheckpoint: for another scheme, or tensors that are not as it says.
    """
    described = description_in(checkpoint)
    if described is None:
        return None
    kind, content = described
    if kind == ASCEND:
        names = [name for name, scheme in content.items() if scheme == DYNAMIC and name.endswith(".weight")]
        names += _with_scale({name for name, scheme in content.items() if scheme == DYNAMIC})
        ignored = tuple(name for name, scheme in content.items() if scheme == FLOAT)
    else:
        names = _with_scale(checkpoint.tensors.keys())
        ignored = tuple(content.get("ignore") or ())
    weights = {name: int8_weight(checkpoint, name) for name in dict.fromkeys(names)}
    lonely = [n for n, e in checkpoint.tensors.items() if e.dtype == "I8" and n not in weights]
    if lonely:
        raise BadCheckpoint(f"{checkpoint.folder}: {lonely[0]} is int8 without {lonely[0]}{SCALE}")
    return W8A8(kind, weights, ignored)


def _with_scale(names: Collection[str]) -> list[str]:
    """Of a weight without its scale, or a scale without its weight, too; a model may have a `logit_scale` besides."""
    bases = [name.removesuffix(SCALE) for name in names if name.endswith(SCALE)]
    return [base for base in bases if base in names or base.endswith(".weight")]


def description_in(checkpoint: Checkpoint) -> tuple[str, Mapping[str, Any]] | None:
    """Who describes it, and how: the scheme is the one that is known here.

    Raises:
        BadCheckpoint: for another scheme.
    """
    content = quantization_config_of(checkpoint.config)
    if content is not None:
        check_config(content, checkpoint.folder)
        return COMPRESSED_TENSORS, content
    if not (checkpoint.folder / DESCRIPTION).is_file():
        return None
    description = json_of(checkpoint.folder / DESCRIPTION)
    scheme = description.get("model_quant_type")
    others = {each for name, each in description.items() if name in checkpoint.tensors} - {DYNAMIC, FLOAT}
    if scheme != DYNAMIC or others:
        named = ", ".join(map(str, sorted(others, key=str) or [scheme]))
        raise BadCheckpoint(f"{checkpoint.folder / DESCRIPTION}: the scheme {named} is unknown; known is {DYNAMIC}")
    return ASCEND, description


def quantization_config_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Of a configuration, or of the language model within it."""
    for each in (config, config.get("text_config") or {}):
        found = each.get("quantization_config") or each.get("compression_config")
        if found:
            return dict(found)
    return None


def check_config(content: Mapping[str, Any], folder: Path) -> None:
    """
    Raises:
        BadCheckpoint: if `quantization_config` is of another scheme.
    """
    method = content.get("quant_method")
    if method != COMPRESSED_TENSORS or content.get("format") != FORMAT:
        raise BadCheckpoint(
            f"{folder}: the quantisation {method!r}, format {content.get('format')!r}, is unknown; known is "
            f"{COMPRESSED_TENSORS!r}, {FORMAT!r}"
        )
    for name, group in (content.get("config_groups") or {}).items():
        for part, wanted in (("weights", WEIGHTS), ("input_activations", ACTIVATIONS)):
            given = group.get(part) or {}
            wrong = {key: given.get(key) for key, value in wanted.items() if given.get(key) != value}
            if wrong:
                known = _listed({key: wanted[key] for key in wrong})
                raise BadCheckpoint(f"{folder}: {part} of {name} with {_listed(wrong)}; known is {known}")


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value!r}" for name, value in values.items())


def int8_weight(checkpoint: Checkpoint, name: str) -> Int8Weight:
    """
    Raises:
        BadCheckpoint: if there is no int8 weight of that name with a scale of each output channel.
    """
    tensors = checkpoint.tensors
    weight, scale = tensors.get(name), tensors.get(name + SCALE)
    if weight is None or scale is None:
        raise BadCheckpoint(f"{checkpoint.folder} has no {name if weight is None else name + SCALE}")
    if weight.dtype != "I8" or scale.dtype not in SCALE_DTYPES:
        raise BadCheckpoint(
            f"{checkpoint.folder}: {name} is {weight.dtype} with a scale {scale.dtype}; known are I8 with "
            f"{', '.join(SCALE_DTYPES)}"
        )
    *batch, rows, columns = weight.shape if len(weight.shape) > 1 else (0, 0)
    known = [(*batch, rows, 1)] + ([(*batch, 1, columns)] if batch else [(rows,)])
    if scale.shape not in known:
        raise BadCheckpoint(
            f"{checkpoint.folder}: {scale.name} is {list(scale.shape)} beside a weight {list(weight.shape)}; known are "
            f"{' and '.join(str(list(shape)) for shape in known)}"
        )
    return Int8Weight(weight, scale)
