"""What is read of attention layers that split their row by `cu_seqlens`, and what is not."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import models
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from npu_patch.ops.readings import AsNamed, NotRead
from npu_patch.patches.vision.attention import find, read_site
from npu_patch.probe.vision_attention import read_vision_attention


def test_every_class_of_transformers_that_splits_by_cu_seqlens_is_read() -> None:
    """35 of 35 in transformers 5.23."""
    sites = []
    for file in sorted(Path(models.__path__[0]).glob("*/modeling_*.py")):
        if "cu_seqlens" in file.read_text(encoding="utf-8"):
            sites += find(importlib.import_module(f"transformers.models.{file.parent.name}.{file.stem}"))
    assert len(sites) >= 8  # of transformers 4.57
    assert [site.label for site in sites if not isinstance(read_site(site), AsNamed)] == []


class Layer(nn.Module):
    """The skeleton: one call of flash attention, or one of any other for each segment."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.heads, self.is_causal = config, config.num_heads, False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor) -> Tensor:
        query, key, value = self.qkv(hidden_states).view(len(hidden_states), 3, self.heads, -1).unbind(1)
        query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        if self.config._attn_implementation == "flash_attention_2":
            return self.at_once(attend, query, key, value, cu_seqlens)
        lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
        parts = zip(*(each.split(lengths, 2) for each in (query, key, value)), strict=True)
        found = [attend(self, *part, attention_mask=None, is_causal=False)[0] for part in parts]
        return torch.cat(found, 1).flatten(2)[0]

    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return attended(self, attend, q, k, v, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, is_causal=False)


def attended(layer: nn.Module, attend: Callable[..., Any], *qkv: Tensor, **given: Any) -> Tensor:
    found: Tensor = attend(layer, *qkv, attention_mask=None, **given)[0].flatten(2)[0]
    return found


class CausalAtOnce(Layer):
    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return attended(self, attend, q, k, v, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, is_causal=True)


class OtherLengths(Layer):
    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        ends = lengths[[0, -1]]
        return attended(self, attend, q, k, v, cu_seq_lens_q=ends, cu_seq_lens_k=ends, is_causal=False)


class AnotherScale(Layer):
    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        at_once: Tensor = super().at_once(attend, 1.1 * q, k, v, lengths)
        return at_once


class AnotherGradient(Layer):
    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        at_once: Tensor = super().at_once(attend, q, k.detach(), v, lengths)
        return at_once


class Twice(Layer):
    def at_once(self, attend: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        super().at_once(attend, q, k, v, lengths)
        at_once: Tensor = super().at_once(attend, q, k, v, lengths)
        return at_once


def test_the_skeleton_is_read() -> None:
    assert isinstance(read_vision_attention(Layer), AsNamed)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (CausalAtOnce, "something else than its segments"),
        (OtherLengths, "something else than its segments"),
        (AnotherScale, "computes something else"),
        (AnotherGradient, "computes something else"),
        (Twice, "2 times"),
    ],
)
def test_one_call_that_is_not_that_of_all_segments_is_not(layer: type[nn.Module], reason: str) -> None:
    found = read_vision_attention(layer)
    assert isinstance(found, NotRead) and reason in found.reason
