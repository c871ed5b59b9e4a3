"""How many heads the attention layers of a model have and how wide they are, told by their configs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from npu_patch.sites.sites import LiveModules


@dataclass(frozen=True)
class HeadSizes:
    """`rotary`: how much of a head is rotated. `sinks`: there is one more logit for each head."""

    heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    rotary: int
    sinks: bool = False


def head_sizes(layers: Iterable[torch.nn.Module], live: LiveModules) -> Iterator[HeadSizes]:
    """Each once. Layers whose config does not say are left out."""
    found: dict[HeadSizes, None] = {}
    rotated: dict[int, set[int]] = {}
    for layer in layers:
        config = getattr(layer, "config", None)
        heads = _number(config, "num_attention_heads") or _number(layer, "num_heads")  # of a tower
        if heads is None:
            continue
        latent = _number(layer, "qk_head_dim")
        key_heads = heads if latent else _number(config, "num_key_value_heads") or heads
        width = latent or _number(layer, "head_dim") or _number(config, "head_dim")
        width = width or (_number(config, "hidden_size") or 0) // heads
        if not width or heads % key_heads:
            continue
        if id(config) not in rotated:
            rotated[id(config)] = rotary_widths(live, config, width)
        value_dim = (_number(layer, "v_head_dim") if latent else None) or width
        sinks = any(each.shape == (heads,) for each in layer.parameters(recurse=False))
        for rotary in rotated[id(config)]:
            found[HeadSizes(heads, key_heads, width, value_dim, rotary, sinks)] = None
    yield from found


def rotary_widths(live: LiveModules, config: Any, head_dim: int) -> set[int]:
    """How much of a head the model's tables rotate, told by the frequencies they are made of, one for each pair; the
    whole head where the model shows none."""
    buffers = (
        buffer
        for module in live
        if getattr(module, "config", None) is config
        for name, buffer in module.named_buffers(recurse=False)
        if name.endswith("inv_freq") and buffer.dim() == 1
    )
    return {2 * len(buffer) for buffer in buffers if 2 * len(buffer) <= head_dim} or {head_dim}


def _number(owner: Any, name: str) -> int | None:
    value = getattr(owner, name, None)
    return value if type(value) is int and value > 0 else None
