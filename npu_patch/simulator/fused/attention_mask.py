"""Which keys a query may not see: the attention mask and the sparse mode together."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from ..refusal import require
from .attention_layout import Layout

UNLIMITED = 2147483647
COMPRESSED = 2048
SPARSE_MODES = {
    0: "defaultMask",
    1: "allMask",
    2: "leftUpCausal",
    3: "rightDownCausal",
    4: "band",
}


@dataclass(frozen=True)
class Hidden:
    """`of(index, query length, key length)`: a bool tensor, True where hidden, that broadcasts to [N, Sq, Skv] for
    sequence `index`; or None where nothing is hidden. `rows_may_be_empty`: fully hidden rows give 0, whatever
    inner_precise says."""

    of: Callable[[int, int, int], Tensor | None]
    empty_rows_give_zero: bool = False


def hidden_by(
    operator: str,
    layout: Layout,
    mask: Tensor | None,
    sparse_mode: int,
    before: int,
    after: int,
) -> Hidden:
    """Check mask, sparse_mode, pre_tockens (`before`) and next_tockens (`after`).

    Without a mask nothing is hidden, whatever the sparse mode: the operator ignores it then.
    """
    require(sparse_mode in range(9), operator, f"sparse_mode must be 0 to 8, not {sparse_mode}")
    require(
        sparse_mode in SPARSE_MODES,
        operator,
        f"sparse_mode {sparse_mode} is not simulated (0 to 4 are: {SPARSE_MODES})",
    )
    if mask is None:
        return Hidden(lambda index, queries, keys: None)
    require(mask.dtype in (torch.bool, torch.uint8), operator, f"atten_mask must be bool or uint8, not {mask.dtype}")
    if sparse_mode in (2, 3, 4):
        return _compressed(operator, layout, mask, sparse_mode, before, after)
    return _full(operator, layout, mask, sparse_mode, before, after)


def _compressed(operator: str, layout: Layout, mask: Tensor, sparse_mode: int, before: int, after: int) -> Hidden:
    require(
        tuple(mask.shape) == (COMPRESSED, COMPRESSED),
        operator,
        f"sparse_mode {sparse_mode} ({SPARSE_MODES[sparse_mode]}) needs atten_mask of shape [2048, 2048], "
        f"not {list(mask.shape)}",
    )
    require(
        bool(torch.equal(mask.bool(), upper_triangle())),
        operator,
        f"sparse_mode {sparse_mode} ({SPARSE_MODES[sparse_mode]}) needs atten_mask to be ones above the diagonal "
        "(triu(1)): 1 means masked",
    )
    if sparse_mode == 3 and layout.name == "TND":
        for queries, keys in zip(layout.query_lengths, layout.key_lengths, strict=True):
            require(queries <= keys, operator, f"sparse_mode 3 in TND needs Sq <= Skv, not {queries} and {keys}")
    if sparse_mode == 2:
        return Hidden(lambda index, queries, keys: outside_band(queries, keys, 0, UNLIMITED, 0))
    if sparse_mode == 3:
        before, after = UNLIMITED, 0
    return Hidden(
        lambda index, queries, keys: outside_band(queries, keys, keys - queries, before, after),
        empty_rows_give_zero=True,
    )


def _full(operator: str, layout: Layout, mask: Tensor, sparse_mode: int, before: int, after: int) -> Hidden:
    queries, keys = layout.longest
    batch, heads = layout.batch, layout.query_heads
    shape = tuple(mask.shape)
    if layout.name == "TND":
        total = sum(layout.query_lengths), sum(layout.key_lengths)
        require(
            shape in ((queries, keys), total),
            operator,
            f"atten_mask must be [max Sq, max Skv] = {[queries, keys]} in TND, not {list(shape)}",
        )
        whole = shape == total and shape != (queries, keys)
    else:
        allowed = [(batch, heads, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)]
        require(
            shape in allowed,
            operator,
            "atten_mask must be [B,N,Sq,Skv], [B,1,Sq,Skv], [1,1,Sq,Skv] or [Sq,Skv], "
            f"one of {[list(s) for s in dict.fromkeys(allowed)]}, not {list(shape)}",
        )
    masked = mask.bool()

    def of(index: int, query_length: int, key_length: int) -> Tensor:
        if layout.name == "TND":
            row, column = (sum(layout.query_lengths[:index]), sum(layout.key_lengths[:index])) if whole else (0, 0)
            return masked[row : row + query_length, column : column + key_length]
        return masked if masked.dim() == 2 else masked[index if masked.shape[0] > 1 else 0]

    limited = before != UNLIMITED or after != UNLIMITED
    if sparse_mode == 0 and limited:
        # pre/next only tell the kernel which blocks to skip: what they skip must be masked, or the result depends on
        # the block size.
        for index, (rows, columns) in enumerate(zip(layout.query_lengths, layout.key_lengths, strict=True)):
            skipped = outside_band(rows, columns, 0, before, after)
            require(
                not bool((skipped & ~of(index, rows, columns)).any()),
                operator,
                f"sparse_mode 0: pre_tockens={before}, next_tockens={after} skip keys that atten_mask does not hide",
            )
    return Hidden(of)


def outside_band(queries: int, keys: int, shift: int, before: int, after: int) -> Tensor:
    """True where key j is not within [i + shift - before, i + shift + after] of query i."""
    offset = torch.arange(keys)[None, :] - torch.arange(queries)[:, None] - shift
    return (offset > after) | (offset < -before)


@cache
def upper_triangle() -> Tensor:
    return torch.ones(COMPRESSED, COMPRESSED, dtype=torch.bool).triu_(1)
