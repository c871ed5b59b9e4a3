"""How tokens lie in chunks, chunks in groups, and which tokens of packed sequences see each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Tokens `[B, T, heads, ...]` as chunks `[L, G, B, heads, C, ...]`: chunk i of group j holds the C tokens from
    (j L + i) C. T is padded with zeros to L G C, and such tokens neither decay nor change a state."""

    tokens: int
    chunk: int
    length: int
    groups: int

    @property
    def padded(self) -> int:
        return self.chunk * self.length * self.groups

    @property
    def chunks(self) -> int:
        return self.length * self.groups

    def chunked(self, x: Tensor) -> Tensor:
        """A view, or a view of a padded copy."""
        if self.padded != self.tokens:
            x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, self.padded - self.tokens))
        shape = (x.shape[0], self.groups, self.length, self.chunk, *x.shape[2:])
        return x.reshape(shape).permute(2, 1, 0, 4, 3, *range(5, x.dim() + 2))

    def tokenwise(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The tokens `[B, T, heads, ...]` of chunks `[L, G, B, heads, C, ...]`, in `dtype`; one copy."""
        batch, heads = x.shape[2:4]
        tokens = torch.empty((batch, self.padded, heads, *x.shape[5:]), dtype=dtype, device=x.device)
        tokens.unflatten(1, (self.groups, self.length, self.chunk)).copy_(x.permute(2, 1, 0, 4, 3, *range(5, x.dim())))
        return tokens[:, : self.tokens]

    def of_positions(self, x: Tensor) -> Tensor:
        """`[L, G, C]` of a value per padded token `[L G C]`."""
        return x.view(self.groups, self.length, self.chunk).transpose(0, 1)


def layout_for(tokens: int, chunk: int, length: int | None, device_type: str) -> Layout:
    """Chunks of `chunk` tokens, or of fewer if there are no more tokens; groups of `length` chunks, by default as many
    as make the steps over chunks fewest: 3 (L - 1) + G of them. A CPU gains nothing from fewer and larger products."""
    chunk = min(chunk, 1 << max(0, tokens - 1).bit_length())
    chunks = max(1, -(-tokens // chunk))
    if length is None:
        choices = (1,) if device_type == "cpu" else (1, 2, 4, 8, 16)
        length = min(choices, key=lambda length: 3 * (length - 1) + -(-chunks // length))
    length = min(length, chunks)
    return Layout(tokens, chunk, length, -(-chunks // length))


@dataclass(frozen=True)
class Boundaries:
    """Where packed sequences begin and end, computed on the device.

    `other`: bool `[L, G, C, C]`, whether two tokens of a chunk are of different sequences. `entering`: float
    `[L, G, 1, C]`, 1 where the sequence of a token began before the chunk, else 0.
    `last_chunk` and `last_slot`: int `[N]`, where each sequence ends, as an index into `[L G]` and one into `[C]`.
    `filled`: float `[N]`, 0 for a sequence of no tokens.
    """

    other: Tensor
    entering: Tensor
    last_chunk: Tensor
    last_slot: Tensor
    filled: Tensor


def boundaries(cu_seqlens: Tensor, layout: Layout, dtype: torch.dtype) -> Boundaries:
    """From the bounds of the sequences `[N + 1]`, cumulative lengths from 0 to T."""
    ends = cu_seqlens[1:].contiguous()
    position = torch.arange(layout.padded, device=ends.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends, position, right=True)
    before = sequence.view(-1, layout.chunk)[:, :1].clone()
    before[1:] = sequence.view(-1, layout.chunk)[:-1, -1:]
    own = layout.of_positions(sequence)
    before = before.view(layout.groups, layout.length, 1).transpose(0, 1)
    last = (ends - 1).clamp_min(0)
    chunk = last // layout.chunk
    return Boundaries(
        other=own[..., :, None] != own[..., None, :],
        entering=(own == before)[:, :, None].to(dtype),
        last_chunk=chunk % layout.length * layout.groups + chunk // layout.length,
        last_slot=last % layout.chunk,
        filled=(cu_seqlens[1:] > cu_seqlens[:-1]).to(dtype),
    )
