"""Attention inputs as one list of sequences, whatever their layout string.

A sequence is a [N, S, D] tensor: one entry of the batch, or one packed sequence of TND.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import require

LAYOUTS = ("BSH", "SBH", "BNSD", "BSND", "TND")


@dataclass(frozen=True)
class Layout:
    """What the shapes of q, k, v mean. Lengths are per sequence."""

    name: str
    batch: int
    query_heads: int
    key_heads: int
    head_dim: int
    value_dim: int
    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]

    @property
    def longest(self) -> tuple[int, int]:
        return max(self.query_lengths, default=0), max(self.key_lengths, default=0)


def layout_of(
    operator: str,
    layout: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_heads: int,
    query_ends: Sequence[int] | None,
    key_ends: Sequence[int] | None,
    key_heads: int | None = None,
) -> Layout:
    """Check the shapes against the layout. `query_ends`: cumulative lengths, for TND only. `key_heads`: for BSH and SBH
    the number of key heads if it is an argument of the operator, else it follows from the shapes."""
    require(layout in LAYOUTS, operator, f"input_layout must be one of {', '.join(LAYOUTS)}, not {layout!r}")
    rank = 4 if layout in ("BNSD", "BSND") else 3
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require(tensor.dim() == rank, operator, f"{name} must be {rank}-D in {layout}, not {list(tensor.shape)}")
    if layout in ("BSH", "SBH"):
        head_dim, key_heads = _heads_of_hidden(operator, query, key, value, query_heads, key_heads)
        value_dim = value.shape[2] // key_heads
        batch_at, length_at = (0, 1) if layout == "BSH" else (1, 0)
        batch, key_batch = query.shape[batch_at], key.shape[batch_at]
        lengths = (query.shape[length_at],) * batch, (key.shape[length_at],) * key_batch
        same = key.shape[:2] == value.shape[:2]
    elif layout == "TND":
        lengths = _packed(operator, "qlen", query, query_ends), _packed(operator, "kvlen", key, key_ends)
        batch, key_batch = len(lengths[0]), len(lengths[1])
        head_dim, value_dim, key_heads = key.shape[2], value.shape[2], key.shape[1]
        same = key.shape[:2] == value.shape[:2]
    else:
        heads_at, length_at = (1, 2) if layout == "BNSD" else (2, 1)
        batch, key_batch = query.shape[0], key.shape[0]
        lengths = (query.shape[length_at],) * batch, (key.shape[length_at],) * key_batch
        head_dim, value_dim, key_heads = key.shape[3], value.shape[3], key.shape[heads_at]
        same = key.shape[:3] == value.shape[:3]
    require(same, operator, f"key {list(key.shape)} and value {list(value.shape)} must differ in D only")
    require(batch == key_batch, operator, f"query has {batch} sequences and key has {key_batch}: they must be as many")
    if layout in ("BNSD", "BSND", "TND"):
        actual = query.shape[2 if layout == "BSND" else 1]
        require(
            query_heads == actual,
            operator,
            f"head_num must be the number of query heads, {actual} in {layout} {list(query.shape)}, not {query_heads}",
        )
        require(
            query.shape[-1] == head_dim,
            operator,
            f"query {list(query.shape)} and key {list(key.shape)} must have one head dimension",
        )
    require(
        key_heads > 0 and query_heads % key_heads == 0,
        operator,
        f"the number of query heads must be a multiple of the number of key heads, not {query_heads} and {key_heads}",
    )
    return Layout(layout, batch, query_heads, key_heads, head_dim, value_dim, *lengths)


def _heads_of_hidden(
    operator: str, query: Tensor, key: Tensor, value: Tensor, query_heads: int, key_heads: int | None
) -> tuple[int, int]:
    """D and the number of key heads, where the last dimension holds all heads."""
    hidden = query.shape[2]
    require(
        query_heads > 0 and hidden % query_heads == 0,
        operator,
        f"head_num {query_heads} must divide the last dimension of query {list(query.shape)}",
    )
    head_dim = hidden // query_heads
    if key_heads is None:
        require(
            key.shape[2] % head_dim == 0,
            operator,
            f"the last dimension of key {list(key.shape)} must be a multiple of D={head_dim}",
        )
        key_heads = key.shape[2] // head_dim
    require(
        key_heads > 0 and key.shape[2] == key_heads * head_dim and value.shape[2] % key_heads == 0,
        operator,
        f"key {list(key.shape)} and value {list(value.shape)} do not hold {key_heads} heads of D={head_dim}",
    )
    return head_dim, key_heads


def split(tensor: Tensor, layout: str, heads: int, lengths: tuple[int, ...]) -> list[Tensor]:
    """The sequences of a tensor, each a view [heads, S, D]."""
    if layout == "TND":
        return [part.transpose(0, 1) for part in tensor.split(list(lengths), 0)]
    if layout == "BNSD":
        return list(tensor.unbind(0))
    if layout == "BSND":
        return [entry.transpose(0, 1) for entry in tensor.unbind(0)]
    batch_at = 0 if layout == "BSH" else 1
    return [entry.unflatten(-1, (heads, -1)).transpose(0, 1) for entry in tensor.unbind(batch_at)]


def join(sequences: list[Tensor], layout: str) -> Tensor:
    """The inverse of `split`: a new contiguous tensor."""
    if layout == "TND":
        return torch.cat([sequence.transpose(0, 1) for sequence in sequences], 0)
    if layout == "BNSD":
        return torch.stack(sequences, 0)
    if layout == "BSND":
        return torch.stack([sequence.transpose(0, 1) for sequence in sequences], 0)
    return torch.stack([sequence.transpose(0, 1).flatten(1) for sequence in sequences], 0 if layout == "BSH" else 1)


def _packed(operator: str, which: str, tensor: Tensor, ends: Sequence[int] | None) -> tuple[int, ...]:
    """Lengths of the packed sequences from their cumulative ends."""
    argument = f"actual_seq_{which}"
    ends = [int(end) for end in ends or ()]
    require(len(ends) > 0, operator, f"TND needs {argument}")
    lengths = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    require(
        all(length >= 0 for length in lengths),
        operator,
        f"{argument} must be cumulative ends without the leading 0, not {ends}",
    )
    require(
        ends[-1] == tensor.shape[0],
        operator,
        f"the last entry of {argument} must be T={tensor.shape[0]}, not {ends[-1]}",
    )
    return tuple(lengths)
