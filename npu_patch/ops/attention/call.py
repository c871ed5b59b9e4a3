"""One call of attention, as every implementation takes it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from npu_patch.ops.attention.band import FULL, Band


@dataclass(frozen=True)
class Attention:
    """What to compute from query `[B, N, Sq, D]`, key `[B, Nkv, Skv, D]` and value `[B, Nkv, Skv, Dv]`; or, with
    `ends`, from packed `[T, N, D]`, `[Tkv, Nkv, D]` and `[Tkv, Nkv, Dv]`.

    `hidden`: bool, True where a query does not see a key, in one of the operator's shapes (`in_operator_shape`); not
    together with a `band`. `bias`: added to the scaled scores, broadcasts to `[B, N, Sq, Skv]`. `sink`: `[N]`, one more
    logit in each softmax. `ends`: where each packed sequence ends, for queries and for keys. `empty_rows_give_zero`:
    what a query without any key gets; else the mean of the values. `decodes`: the queries are the latest tokens of a
    sequence whose other keys come from a cache.
    """

    scale: float
    band: Band = FULL
    hidden: Tensor | None = None
    bias: Tensor | None = None
    sink: Tensor | None = None
    dropout: float = 0.0
    ends: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    empty_rows_give_zero: bool = True
    decodes: bool = False
