"""Which RoPE variant a module-level function computes, and how it lays its tables over its inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import NotRead, RoPEReading, Signature
from npu_patch.ops.rope import VARIANTS, mix_sections

BATCH, HEADS, KEY_HEADS, LENGTH, ROTARY_DIM, PASSED = 2, 3, 1, 5, 8, 4
SECTIONS = [1, 2, 1]  # of M-RoPE, in pairs of ROTARY_DIM


def read_rope(function: Callable[..., Any]) -> RoPEReading | NotRead:
    """The reading of `function`, or the reason why there is none."""
    signature = _signature(function)
    if isinstance(signature, NotRead):
        return signature
    with quiet_room():
        for unsqueeze_dim in (signature.default_dimension,) if signature.dimension else (1, -2, None):
            reading = _read(function, signature, unsqueeze_dim)
            if reading is not None:
                return reading
    return NotRead("computes no known rotation of its inputs")


def _signature(function: Callable[..., Any]) -> Signature | NotRead:
    parameters = inspect.signature(function).parameters
    names = tuple(parameters)
    if "cos" not in parameters or "sin" not in parameters:
        return NotRead("takes no cos and sin: a rotation by complex numbers or positions has no operator")
    tensors = names[: min(names.index("cos"), names.index("sin"))]
    if not 1 <= len(tensors) <= 2:
        return NotRead(f"rotates {len(tensors)} tensors; one or two are known")
    rest = [name for name in names if name not in (*tensors, "cos", "sin")]
    dimension = "unsqueeze_dim" if "unsqueeze_dim" in rest else None
    positions = "position_ids" if "position_ids" in rest else None
    required = [name for name in rest if parameters[name].default is inspect.Parameter.empty]
    required = [name for name in required if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
    if len(required) > 1 or (dimension in required) or (positions in required):
        return NotRead(f"needs {', '.join(required)} besides its tensors")
    unknown = [name for name in rest if name not in (dimension, positions, *required)]
    if unknown:
        return NotRead(f"takes {', '.join(unknown)}, whose meaning is not known")
    default = parameters[dimension].default if dimension else 0
    return Signature(names, tensors, dimension, default, required[0] if required else None, positions)


def _read(function: Callable[..., Any], signature: Signature, unsqueeze_dim: int | None) -> RoPEReading | None:
    for variant in VARIANTS:
        candidate = RoPEReading(variant, signature, unsqueeze_dim, partial=False)
        if signature.sections and variant.table.width(2) != 2:
            continue
        if _distance(function, candidate, torch.float32, torch.float32) > 1.0:
            continue
        for output in ("promoted", "input"):
            candidate = dataclasses.replace(candidate, variant=dataclasses.replace(variant, output=output))
            if all(_distance(function, candidate, *dtypes) <= 1.0 for dtypes in _HALF_PRECISION_DTYPES):
                return _complete(function, candidate)
    return None


_HALF_PRECISION_DTYPES = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))


def _complete(function: Callable[..., Any], reading: RoPEReading) -> RoPEReading | None:
    """What the first calls left open: the other head dimension, positions that must not matter, partial rotation."""
    float32 = (torch.float32, torch.float32)
    if reading.signature.dimension:
        other = 2 if reading.signature.default_dimension == 1 else 1
        if _distance(function, dataclasses.replace(reading, unsqueeze_dim=other), *float32) > 1.0:
            return None
    if reading.signature.positions and _distance(function, reading, *float32, with_positions=True) > 1.0:
        return None
    partial = dataclasses.replace(reading, partial=True)
    return partial if _distance(function, partial, *float32) <= 1.0 else reading


def _distance(
    function: Callable[..., Any],
    reading: RoPEReading,
    input_dtype: torch.dtype,
    table_dtype: torch.dtype,
    with_positions: bool = False,
) -> float:
    signature, variant = reading.signature, reading.variant
    observed_inputs = _inputs(reading, input_dtype)
    expected_inputs = _inputs(reading, input_dtype)
    cos, sin = _tables(reading, table_dtype)
    call: dict[str, Any] = dict(zip(signature.tensors, observed_inputs, strict=True)) | {"cos": cos, "sin": sin}
    if signature.dimension:
        call[signature.dimension] = reading.unsqueeze_dim
    if signature.sections:
        call[signature.sections] = SECTIONS
    if with_positions and signature.positions is not None:
        call[signature.positions] = torch.tensor([[3, 1, 0, 2, 4]] * BATCH, device="cpu")
    try:
        observed = function(**call)
    except Exception as error:
        unless_accident(error)
        return float("inf")
    observed = [observed] if isinstance(observed, Tensor) else observed
    if not isinstance(observed, (tuple, list)):
        return float("inf")
    if signature.sections:
        cos, sin = mix_sections(cos, SECTIONS), mix_sections(sin, SECTIONS)
    if reading.unsqueeze_dim is not None:
        cos, sin = cos.unsqueeze(reading.unsqueeze_dim), sin.unsqueeze(reading.unsqueeze_dim)
    expected = [variant.reference(x, cos, sin) for x in expected_inputs]
    return distance(observed, expected, observed_inputs, expected_inputs)


def _inputs(reading: RoPEReading, dtype: torch.dtype) -> list[Tensor]:
    """Tensors whose sizes all differ, so that a table laid along the wrong dimension cannot pass."""
    head_dim = ROTARY_DIM + (PASSED if reading.partial else 0)
    tensors = []
    for index, heads in enumerate((HEADS, KEY_HEADS)[: len(reading.signature.tensors)]):
        shape: Sequence[int]
        if reading.unsqueeze_dim == -2:
            shape = (LENGTH, heads, head_dim)
        elif reading.unsqueeze_dim == 2:
            shape = (BATCH, LENGTH, heads, head_dim)
        else:
            shape = (BATCH, heads, LENGTH, head_dim)
        tensors.append(values(shape, 10 + index, dtype, grad=True))
    return tensors


def _tables(reading: RoPEReading, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unrelated numbers, not angles: a function that reads only a part of its tables shows it."""
    width = reading.variant.table.width(ROTARY_DIM)
    if reading.signature.sections:
        shape: tuple[int, ...] = (3, BATCH, LENGTH, width)
    elif reading.unsqueeze_dim == -2:
        shape = (LENGTH, width)
    elif reading.unsqueeze_dim is None:
        shape = (BATCH, 1, LENGTH, width)
    else:
        shape = (BATCH, LENGTH, width)
    return values(shape, 20, dtype), values(shape, 21, dtype)
