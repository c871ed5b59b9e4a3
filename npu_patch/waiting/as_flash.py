"""A vision attention layer seen as one whose model asked for flash attention.

The layers of vision towers hold many images, or windows of images, in one row. Their forward hands `cu_seqlens` to
flash attention in one call, and to any other attention a segment at a time. Which of the two is a question to the
layer's config alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch

from npu_patch.serving.calls import Calls

FLASH, SEGMENTS = "flash_attention_2", "cu_seqlens"
# The replacements of what transformers has under that name, which give such a layer back where they do not serve it.
ONE_CALL: WeakKeyDictionary[Callable[..., Any], Calls] = WeakKeyDictionary()


class FlashConfig:
    """The config of a layer, but for the attention it asks for."""

    _attn_implementation = FLASH

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def as_flash(layer: torch.nn.Module) -> torch.nn.Module:
    """The same parameters, modules and hooks, under another object: the layer itself is not changed."""
    seen = object.__new__(type(layer))
    vars(seen).update(vars(layer), config=FlashConfig(layer.config))
    return seen


def is_as_flash(layer: Any) -> bool:
    return isinstance(getattr(layer, "config", None), FlashConfig)
