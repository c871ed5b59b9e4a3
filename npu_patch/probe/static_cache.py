"""Whether a cache's `update` writes a token where its count says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import remembered, unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.ops.static_cache import write

BATCH, HEADS, LENGTH, WIDTH, VALUE_WIDTH = 2, 3, 7, 4, 5
KEYS, VALUES, COUNT, READY = "keys", "values", "cumulative_length", "is_initialized"
WRITTEN = AsNamed("one token")


@remembered
def read(cls: type, update: Callable[..., Any]) -> AsNamed | NotRead:
    try:
        with quiet_room():
            return _observe(cls, update)
    except Exception as error:
        unless_accident(error)
        return NotRead(f"it cannot be observed ({error_text(error)})", notable=False)


def _observe(cls: type, update: Callable[..., Any]) -> AsNamed | NotRead:
    for dtype in (torch.float32, torch.bfloat16):
        layer = _made(cls, dtype)
        held = dict(vars(layer))
        ours = {name: held[name].clone() for name in (KEYS, VALUES, COUNT)}
        for step in range(3):
            key = values((BATCH, HEADS, 1, WIDTH), 20 + step, dtype)
            value = values((BATCH, HEADS, 1, VALUE_WIDTH), 40 + step, dtype)
            returned = update(layer, key, value, {"cache_position": None})
            write(ours[KEYS], ours[VALUES], ours[COUNT], key, value)
            if type(returned) is not tuple or [id(each) for each in returned] != [id(held[KEYS]), id(held[VALUES])]:
                return NotRead("it does not return its keys and values")
            now = vars(layer)
            if now.keys() != held.keys() or any(now[name] is not each for name, each in held.items()):
                return NotRead("it keeps more than keys, values and a count on the device")
            if not all(torch.equal(held[name], each) for name, each in ours.items()):
                return NotRead("it does not write a token where its count says")
    return WRITTEN


def _made(cls: type, dtype: torch.dtype) -> Any:
    """A layer that holds two tokens, as its own initialization leaves it: that one would import the compiler."""
    layer = cls(max_cache_len=LENGTH)
    held = {KEYS: (BATCH, HEADS, LENGTH, WIDTH), VALUES: (BATCH, HEADS, LENGTH, VALUE_WIDTH)}
    for seed, (name, shape) in enumerate(held.items()):
        setattr(layer, name, values(shape, 10 + seed, dtype))
    count: Tensor = vars(layer)[COUNT]
    count.fill_(2)
    for name, known in (("dtype", dtype), ("device", count.device), (READY, True)):
        setattr(layer, name, known)
    return layer
