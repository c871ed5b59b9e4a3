"""Attention layers small enough to check by hand: what each query should see, and attention computed from that."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.support.gradients import relative_error

SCALE = 0.21
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 2.0**-6}


@dataclass(frozen=True)
class Case:
    """One attention call and the mask that transformers would be asked for. `padding`: tokens of padding in each
    sample, at its left or right. `lengths`: packed sequences of each row. `past`: keys before the first query."""

    batch: int = 2
    heads: int = 6
    key_heads: int = 2
    queries: int = 11
    past: int = 0
    head_dim: int = 16
    value_dim: int | None = None
    causal: bool = True
    window: int | None = None
    padding: tuple[int, ...] | None = None
    side: str = "left"
    lengths: tuple[tuple[int, ...], ...] | None = None

    @property
    def keys(self) -> int:
        return self.past + self.queries

    def attention_mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        mask = torch.ones(self.batch, self.keys, dtype=torch.long)
        for row, count in enumerate(self.padding):
            mask[row, slice(0, count) if self.side == "left" else slice(self.keys - count, None)] = 0
        return mask

    def position_ids(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in self.lengths])

    def seen(self) -> Tensor:
        """[B, 1, Sq, Skv], by definition."""
        seen = torch.zeros(self.batch, 1, self.queries, self.keys, dtype=torch.bool)
        mask, positions = self.attention_mask(), self.position_ids()
        sequence = None if positions is None else (positions == 0).cumsum(-1)
        for b in range(self.batch):
            for i in range(self.queries):
                for j in range(self.keys):
                    distance = self.past + i - j
                    visible = distance >= 0 or not self.causal
                    if self.window is not None:
                        visible &= distance < self.window if self.causal else abs(distance) <= self.window
                    if mask is not None:
                        visible &= bool(mask[b, j])
                    if sequence is not None:
                        visible &= bool(sequence[b, i] == sequence[b, j])
                    seen[b, 0, i, j] = visible
        return seen

    def tensors(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """query [B, N, Sq, D], key [B, Nkv, Skv, D], value [B, Nkv, Skv, Dv] on the CPU."""
        generator = torch.Generator().manual_seed(seed)
        shapes = (
            (self.batch, self.heads, self.queries, self.head_dim),
            (self.batch, self.key_heads, self.keys, self.head_dim),
            (self.batch, self.key_heads, self.keys, self.value_dim or self.head_dim),
        )
        return [(torch.randn(shape, generator=generator) * 1.5).to(dtype) for shape in shapes]

    def module(self) -> Any:
        linear = torch.nn.Linear(1, 1)
        return SimpleNamespace(
            num_key_value_groups=self.heads // self.key_heads,
            is_causal=self.causal,
            training=True,
            layer_idx=0,
            config=SimpleNamespace(_attn_implementation="flash_attention_2"),
            modules=lambda: iter([linear]),
        )

    def mask(self, implementation: str, device: torch.device) -> Any:
        """The mask that transformers makes for this attention implementation."""
        from transformers import LlamaConfig, masking_utils

        config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation=implementation)
        config.sliding_window = self.window
        masks = {
            (True, False): masking_utils.create_causal_mask,
            (True, True): masking_utils.create_sliding_window_causal_mask,
            (False, False): masking_utils.create_bidirectional_mask,
            (False, True): masking_utils.create_bidirectional_sliding_window_mask,
        }
        mask, positions = self.attention_mask(), self.position_ids()
        arguments: dict[str, Any] = {} if positions is None else {"position_ids": positions.to(device)}
        return masks[self.causal, self.window is not None](
            config,
            torch.empty(self.batch, self.queries, 8, device=device),
            None if mask is None else mask.to(device),
            past_key_values=_past(self.past) if self.past else None,
            **arguments,
        )


def _past(length: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), 0)
    return cache


def exact(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, bias: Tensor | None = None, sinks: Tensor | None = None
) -> Tensor:
    """[B, Sq, N, Dv] as eager attention defines it."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * SCALE
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        return (torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


def leaves(tensors: list[Tensor | None], device: torch.device | str, dtype: torch.dtype | None = None) -> list[Any]:
    """Copies that collect gradients; None stays None."""
    return [
        None if t is None else t.detach().to(device=device, dtype=dtype or t.dtype).requires_grad_(True)
        for t in tensors
    ]


def errors(
    out: Tensor, inputs: list[Any], expected: Tensor, expected_inputs: list[Any], rows: Tensor | None = None
) -> list[float]:
    """Relative errors of the output and of every gradient. rows: [B, 1, Sq, 1], the queries that count, if not all."""
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).to(expected.dtype)
    if rows is not None:
        weight = weight * rows.transpose(1, 2)
    (out * weight.to(out)).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(out.detach() * (weight != 0).to(out.device), expected.detach() * (weight != 0))]
    pairs += [(a.grad, b.grad) for a, b in zip(inputs, expected_inputs, strict=True) if a is not None]
    return [relative_error(a.cpu().double(), b.double()) for a, b in pairs]
