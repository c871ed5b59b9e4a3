"""Packed sequences: where they end, read by the host once per step.

Several layers of one step are given the same tensor objects (position ids, cumulative lengths, padding masks). What is
worked out from one is kept for as long as that object lives and nobody writes to it, so that every layer but the first
finds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from npu_patch.numerics.selective_checkpointing import unseen
from npu_patch.numerics.written import version_of
from npu_patch.serving.read_in_forward import running

Value = TypeVar("Value")
Ends = tuple[int, ...]


@dataclass(frozen=True)
class _Kept:
    """`versions` of all the tensors that `value` is of, `others`: the tensors after the first."""

    versions: tuple[int | None, ...]
    others: tuple[TensorWeakRef, ...]
    value: Any

    def is_of(self, tensors: tuple[Tensor, ...], versions: tuple[int | None, ...]) -> bool:
        if self.versions != versions:  # as many versions as tensors
            return False
        return all([known() is tensor for known, tensor in zip(self.others, tensors[1:], strict=True)])


class OncePerTensor:
    """`of(tensors, make)` calls `make()` once for the same tensor objects with the same contents."""

    def __init__(self) -> None:
        self._kept: MutableMapping[Tensor, _Kept] = WeakTensorKeyDictionary()
        # The layers of a step ask one after the other: the dictionary's way takes the host six times as long.
        self._last: tuple[weakref.ref[Tensor], _Kept] | None = None

    def of(self, tensors: tuple[Tensor, ...], make: Callable[[], Value]) -> Value:
        versions = tuple([version_of(tensor) for tensor in tensors])
        if None in versions:  # made in inference mode: a write would go unnoticed
            return made_apart(make)
        kept = self._found(tensors[0])
        if kept is not None and kept.is_of(tensors, versions):
            value: Value = kept.value
            return value
        value = made_apart(make)
        self.keep(tensors, value)
        return value

    def _found(self, first: Tensor) -> _Kept | None:
        last = self._last
        if last is not None and last[0]() is first:
            return last[1]
        kept = self._kept.get(first)
        if kept is not None:
            self._last = weakref.ref(first, self._gone), kept
        return kept

    def _gone(self, reference: weakref.ref[Tensor]) -> None:
        if self._last is not None and self._last[0] is reference:
            self._last = None

    def by(self, tensors: tuple[Tensor, ...], key: Any, make: Callable[[], Value]) -> Value:
        """One value for each `key`."""
        kept = self.of(tensors, dict)
        if key not in kept:
            kept[key] = made_apart(make)
        return kept[key]

    def keep(self, tensors: tuple[Tensor, ...], value: Any) -> None:
        first, *others = tensors
        versions = tuple(version_of(tensor) for tensor in tensors)
        kept = self._kept[first] = _Kept(versions, tuple(TensorWeakRef(other) for other in others), value)
        self._last = weakref.ref(first, self._gone), kept

    def known(self, tensor: Tensor) -> Any | None:
        kept = self._found(tensor)
        return kept.value if kept is not None and kept.is_of((tensor,), (version_of(tensor),)) else None


def made_apart(make: Callable[[], Value]) -> Value:
    """Not within the saved tensors and the selective checkpointing of the layer that happens to ask first."""
    if torch.compiler.is_compiling():
        return make()
    with torch.inference_mode(False), torch.no_grad(), unseen():  # a later training step may save it
        return make()


def uploaded(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for: of pageable memory it would wait until the device has come
    to it."""
    if device.type == "cpu":
        return host.to(device, copy=True)
    return host.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Padding:
    """A padding mask `[B, S]` unrolled: `indices` of the tokens that are none, on the device, and where each sample
    ends among them."""

    indices: Tensor
    ends: Ends


class HostReads:
    """Everything that a step needs on the host, each read once."""

    def __init__(self) -> None:
        self._on_host, self._ends, self._read_positions = OncePerTensor(), OncePerTensor(), OncePerTensor()
        self._paddings, self._last_paddings, self._packed_indices = OncePerTensor(), OncePerTensor(), OncePerTensor()

    def on_host(self, tensor: Tensor) -> Tensor:
        """Its values, not to be written to."""
        forward = running()
        read = None if forward is None else forward.known(tensor)
        return self._on_host.of((tensor,), tensor.cpu) if read is None else read

    def ends_of_lengths(self, *cumulative: Tensor) -> tuple[Ends, ...]:
        """From cumulative lengths `[0, ..., T]` of queries and of keys: one copy to the host for both."""

        def read() -> tuple[Ends, ...]:
            if all(tensor is cumulative[0] for tensor in cumulative):
                ends = tuple(cumulative[0].tolist()[1:])
                return (ends,) * len(cumulative)
            if len({(tensor.shape, tensor.dtype, tensor.device) for tensor in cumulative}) == 1:
                return tuple(tuple(row[1:]) for row in torch.stack(cumulative).tolist())
            return tuple(tuple(tensor.tolist()[1:]) for tensor in cumulative)

        return self._ends.of(cumulative, read)

    def of_positions(self, position_ids: Tensor, read: Callable[[Tensor], Value]) -> Value:
        """`read(positions on the host)`, once; always the same `read`."""
        return self._read_positions.of((position_ids,), lambda: read(self.on_host(position_ids)))

    def padding(self, mask: Tensor) -> Padding:
        """mask: `[B, S]`, true where there is a token."""
        return self._paddings.of((mask,), lambda: _padding(self.on_host(mask), mask.device))

    def last_padding(self, mask: Tensor, last: int) -> Padding:
        """The padding of the last tokens of each sample."""
        on_host = self.on_host(mask)
        return self._last_paddings.by((mask,), last, lambda: _padding(on_host[:, -last:], mask.device))

    def packed_indices(self, position_ids: Tensor) -> Tensor | None:
        """transformers' packed_sequence_mask for position ids `[B, S]`: which sequence each token belongs to, on the
        device; None where each row is one sequence. Where its sequences end is known from then on: `ends_of_packed`.
        """

        def read() -> Tensor | None:
            starts = _starts(self.on_host(position_ids))
            if not starts[:, 1:].any():
                return None
            indices = starts.cumsum(-1)
            on_device = uploaded(indices, position_ids.device)
            starts[:, 0] = True
            first_tokens = starts.flatten().nonzero().flatten().tolist()
            self._ends.keep((on_device,), ((*first_tokens[1:], starts.numel()),))
            return on_device

        return self._packed_indices.of((position_ids,), read)

    def ends_of_packed(self, indices: Tensor) -> Ends | None:
        """Where the sequences of a packed_sequence_mask end, all rows one after the other; None if it is not known."""
        known = self._ends.known(indices)
        return None if known is None else known[0]


def _padding(mask: Tensor, device: torch.device) -> Padding:
    mask = mask.bool()
    ends = tuple(mask.sum(-1).cumsum(0).tolist())
    return Padding(uploaded(mask.flatten().nonzero().flatten(), device), ends)


def _starts(positions: Tensor) -> Tensor:
    """`[B, S]`, true where a position does not follow the one before; false at the first."""
    starts = torch.zeros(positions.shape, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=-1) != 1
    return starts


HOST_READS = HostReads()
