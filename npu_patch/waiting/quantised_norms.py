"""An RMSNorm that waits for the layers that multiply it in int8, and is known by its int8 rows.

One operator adds, normalizes and quantises; the norm in floating point it does not return. Layers of int8 weights take
the rows. Anybody else gets the norm of the sum, as its module computes it: the first look makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from npu_patch.ops.w8a8.quantised import Quantised
from npu_patch.waiting.contract import AskedAlone, Waiting, name_of
from npu_patch.waiting.heads import deferring


class QuantisedNorm(AskedAlone, torch.Tensor, Waiting):
    """Of `total` `[..., K]`, without a gradient. `rows`: the norm, quantised by token before it is rounded."""

    total: Tensor
    _rows: Quantised
    _norm: Callable[[Tensor], Tensor]
    _told: Callable[[str], None]
    _taken: bool
    _made: Tensor | None
    _given_out: bool  # the tensor itself, or a view of it: whoever has it may write to it

    @staticmethod
    def __new__(
        cls, total: Tensor, rows: Quantised, norm: Callable[[Tensor], Tensor], told: Callable[[str], None]
    ) -> Any:
        """`told`: who used it, once, where that was before anybody took its rows."""
        waiting = torch.Tensor._make_wrapper_subclass(cls, total.shape, dtype=total.dtype, device=total.device)
        waiting.total, waiting._rows, waiting._norm, waiting._told = total, rows, norm, told
        waiting._taken, waiting._made, waiting._given_out = False, None, False
        return waiting

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # as torch says to do
    __hash__ = torch.Tensor.__hash__

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has it without `func`
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        used_by, schema = name_of(func), func._schema
        only_read = not schema.is_mutable and all(each.alias_info is None for each in schema.returns)
        look = QuantisedNorm._tensor if only_read else QuantisedNorm.materialise
        plain_args, plain_kwargs = tree_map_only(
            QuantisedNorm, lambda each: look(each, used_by), (tuple(args), kwargs or {})
        )
        return func(*plain_args, **plain_kwargs)

    @property
    def settled(self) -> bool:
        return self._taken or self._made is not None

    def is_known_in(self, dtype: torch.dtype) -> bool:
        """Whether a layer that computes in `dtype` may take its rows."""
        return dtype == self.dtype and not self._given_out

    def rows(self, *_: object) -> Quantised:
        """In the place of a quantisation (`RowsOf`)."""
        self._taken = True
        return self._rows

    def peek(self) -> Tensor:
        return self._computed() if self._made is None else self._made

    def materialise(self, used_by: str) -> Tensor:
        self._given_out = True
        return self._tensor(used_by)

    def _tensor(self, used_by: str) -> Tensor:
        if self._made is None:
            self._made = self._computed()
            if not self._taken:
                self._told(used_by)
        return self._made

    def _computed(self) -> Tensor:
        with torch.no_grad(), deferring(None):
            return self._norm(self.total)

    _alone = materialise

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Of its tensor, which does not count as a use."""
        return repr(self.peek())
