"""Attention masks that are known by their pattern and are written out only if somebody looks at them.

transformers makes one mask per step and hands it to every layer. Where the mask function is a band, over one sequence
or over packed ones, the attention operators need no mask at all. A `PatternMask` carries the pattern to them. To
anybody else (a layer that slices it, an eager layer, a hook) it is the very tensor that transformers would have made:
the first operation on it builds that one and works on it from then on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from npu_patch.ops.attention.band import Band
from npu_patch.waiting.contract import Waiting, name_of


@dataclass(frozen=True)
class Pattern:
    """`band` within each sequence; `ends`: where packed sequences end, all rows of the batch one after the other."""

    band: Band
    ends: tuple[int, ...] | None = None


class PatternMask(torch.Tensor, Waiting):
    """A bool mask `[B, 1, Sq, Skv]`, True where a query sees a key, that takes no memory until it is used. `pattern`
    holds as long as it is only read."""

    pattern: Pattern | None
    _build: Callable[[], Tensor]
    _built: Tensor | None
    _used_by: str

    @staticmethod
    def __new__(
        cls, shape: tuple[int, ...], device: torch.device, pattern: Pattern, build: Callable[[], Tensor]
    ) -> Any:
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)
        mask.pattern, mask._build, mask._built = pattern, build, None
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to do

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def written_out(mask: PatternMask) -> Tensor:
            mask.pattern = None  # whoever holds the tensor, or a view of it, may write to it
            return mask.materialise(name_of(func))

        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default) and args[0].pattern is not None:
            mask = args[0]
            return PatternMask(mask.shape, mask.device, mask.pattern, lambda: mask.materialise(name_of(func)))
        args, kwargs = tree_map_only(PatternMask, written_out, (args, kwargs or {}))
        return func(*args, **kwargs)

    @property
    def settled(self) -> bool:
        return self._built is not None

    def peek(self) -> Tensor | None:
        if self.pattern is None:
            return self._built
        apart: Tensor = PatternMask(self.shape, self.device, self.pattern, self._build)
        return apart

    def materialise(self, used_by: str) -> Tensor:
        """The mask that transformers makes. Nothing is counted: the original's attention would have had it too."""
        if self._built is None:
            self._built, self._used_by = self._build(), used_by
        return self._built

    def tolist(self) -> list[Any]:
        return self.materialise("tolist").tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # mypy drops its names
        written_out = f", written out for {self._used_by}" if self.settled else ""
        return f"PatternMask({tuple(self.shape)}, {self.pattern}{written_out})"


@dataclass(frozen=True)
class MaskFunctionReading:
    """What a mask function of transformers computes: a band, within the packed sequences of `packed_indices` if there
    are any. `by_position`: the band is one of position ids, which are those of tokens only within a packed sequence."""

    before: int | None = None
    after: int | None = None
    packed_indices: Tensor | None = None
    by_position: bool = False

    def narrowed(self, other: MaskFunctionReading) -> MaskFunctionReading | None:
        """Both together; None for two packings."""
        if self.packed_indices is not None and other.packed_indices is not None:
            return None
        packed = other.packed_indices if self.packed_indices is None else self.packed_indices
        before, after = _least(self.before, other.before), _least(self.after, other.after)
        return MaskFunctionReading(before, after, packed, self.by_position or other.by_position)


def read_mask_function(function: Any) -> MaskFunctionReading | None:
    """What `function(batch, head, query, key)` computes, if it was put together by masking_utils from bands and
    packing only; else None.

    A mask function is recognised by its very code object, so what its closure holds has a known meaning.
    """
    from transformers import masking_utils

    causal = masking_utils.causal_mask_function
    if function is causal:
        return MaskFunctionReading(after=0)
    if function is getattr(masking_utils, "bidirectional_mask_function", causal):
        return MaskFunctionReading()
    if not isinstance(function, FunctionType):
        return None
    factory = _factories().get(function.__code__)
    return None if factory is None else factory(_closure(function))


def _factories() -> dict[Any, Callable[[dict[str, Any]], MaskFunctionReading | None]]:
    """By the code object of what a factory in masking_utils returns, what its closure means."""
    from transformers import masking_utils

    zero = torch.empty(0, device="meta")
    known = (
        ("and_masks", (masking_utils.causal_mask_function,), _all_of),
        ("sliding_window_overlay", (1,), lambda cells: MaskFunctionReading(before=cells["sliding_window"] - 1)),
        (
            "sliding_window_bidirectional_overlay",
            (1,),
            lambda cells: MaskFunctionReading(cells["sliding_window"], cells["sliding_window"]),
        ),
        (
            "packed_sequence_mask_function",
            (zero,),
            lambda cells: MaskFunctionReading(packed_indices=cells["packed_sequence_mask"]),
        ),
        ("remap_positions_for_packed_sequence", (masking_utils.causal_mask_function, zero), _by_position),
    )
    found: dict[Any, Callable[[dict[str, Any]], MaskFunctionReading | None]] = {}
    for name, arguments, meaning in known:
        factory = getattr(masking_utils, name, None)
        if factory is not None:
            found[factory(*arguments).__code__] = meaning
    return found


def _all_of(cells: dict[str, Any]) -> MaskFunctionReading | None:
    together: MaskFunctionReading | None = MaskFunctionReading()
    for part in cells["mask_functions"]:
        reading = read_mask_function(part)
        together = None if reading is None or together is None else together.narrowed(reading)
    return together


def _by_position(cells: dict[str, Any]) -> MaskFunctionReading | None:
    reading = read_mask_function(cells["mask_function"])
    return None if reading is None else replace(reading, by_position=True)


def _closure(function: FunctionType) -> dict[str, Any]:
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


def _least(one: int | None, other: int | None) -> int | None:
    limits = [limit for limit in (one, other) if limit is not None]
    return min(limits) if limits else None
