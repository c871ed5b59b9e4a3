"""What the host read of a model's inputs for the forward that is running, and for no other.

A loader, a broadcast or a graph may fill the same tensors anew without a trace in their versions. So nothing of them
outlasts the forward: each reads its inputs anew, all in one copy.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npu_patch.numerics.written import version_of

MOST_FLOATS = 4096  # of a tensor that the host may be asked about: seconds of a video's frames, say
AS_INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@dataclass(frozen=True)
class Read:
    tensor: Tensor
    version: int | None
    values: Tensor

    @property
    def holds(self) -> bool:
        """Nobody wrote to the tensor since, as far as versions tell."""
        return self.version == version_of(self.tensor)


@dataclass
class Forward:
    """`compiled`: a part of the model is, to which nothing but plain tensors may be given."""

    compiled: bool = False
    _reads: dict[int, Read] = field(default_factory=dict)  # by the tensors' ids: they are kept as long

    def read(self, tensors: Sequence[Tensor]) -> None:
        """Those that nobody read yet in this forward, in one copy to the host."""
        unread = list({id(each): each for each in tensors if self.known(each) is None}.values())
        if len(unread) == 1:
            self.same_as(unread[0], unread[0].detach().cpu())
        elif unread:
            with torch.no_grad():
                numbers = torch.cat([_as_integers(each).reshape(-1).long() for each in unread]).cpu()
            parts = torch.split_with_sizes(numbers, [each.numel() for each in unread])
            for each, part in zip(unread, parts, strict=True):
                self.same_as(each, _from_integers(part, each.dtype).view(each.shape))

    def same_as(self, tensor: Tensor, values: Tensor) -> None:
        self._reads[id(tensor)] = Read(tensor, version_of(tensor), values)

    def known(self, tensor: Tensor) -> Tensor | None:
        """Its values, or those that it is a view of, not to be written to; None where they were not read, or somebody
        wrote to them since."""
        found, base = self._reads.get(id(tensor)), tensor._base
        if found is not None:
            return found.values if found.holds else None
        for read in self._reads.values() if base is not None else ():
            whole = read.tensor
            if (whole is base or whole._base is base) and read.holds and whole.is_contiguous():
                offset = tensor.storage_offset() - whole.storage_offset()
                last = offset + sum(
                    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
                )
                if whole.dtype == tensor.dtype and 0 <= offset <= last < whole.numel():
                    offset += read.values.storage_offset()
                    return read.values.as_strided(tensor.shape, tensor.stride(), offset)
        return None

    def values(self, tensor: Tensor) -> Tensor:
        """A copy on the host, which may be written to."""
        self.read([tensor])
        known = self.known(tensor)
        return tensor.detach().cpu() if known is None else known.clone()


class _Running(threading.local):
    forward: Forward | None = None


_RUNNING = _Running()


def running() -> Forward | None:
    """The forward that this thread is in."""
    return _RUNNING.forward


@contextlib.contextmanager
def forward_of(model: torch.nn.Module) -> Iterator[Forward]:
    """While `model` runs forward: the outermost one's, where forwards are within each other."""
    outer = _RUNNING.forward
    if outer is not None:
        yield outer
        return
    _RUNNING.forward = Forward(any(_is_compiled(each) for each in model.modules()))
    try:
        yield _RUNNING.forward
    finally:
        _RUNNING.forward = None


def _is_compiled(module: torch.nn.Module) -> bool:
    return module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"


def _as_integers(tensor: Tensor) -> Tensor:
    """Bit by bit, where it is none of them."""
    return tensor.view(AS_INTEGERS[tensor.dtype]) if tensor.dtype in AS_INTEGERS else tensor


def _from_integers(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(AS_INTEGERS[dtype]).view(dtype) if dtype in AS_INTEGERS else numbers.to(dtype)
