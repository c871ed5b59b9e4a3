"""Keys and values in pages: a cache of blocks, and for each entry of the batch a table of the blocks that it has.

Source: torch_npu's operator documentation (npu_fused_infer_attention_score, npu_incre_flash_attention). The device does
not look at the numbers in the table; one beyond the cache would read anything, so it is refused here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..refusal import given, require, require_dtype, values_count

WIDEST_ROW = 65535  # of [blocks, block_size, H]
MOST_ELEMENTS = (1 << 31) - 1


@dataclass(frozen=True)
class Paged:
    operator: str
    table: Tensor
    block_size: int
    lengths: Sequence[int] | None
    layout: str
    """Of query."""
    key_heads: int

    def check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        name, size, table = self.operator, self.block_size, self.table
        require(self.layout != "TND", name, "block_table with TND is not simulated")
        decodes = query.shape[2 if self.layout == "BNSD" else 1] == 1
        step, least = (16, 16) if decodes else (128, 128)
        require(
            size % step == 0 and least <= size <= 512,
            name,
            f"block_size must be a multiple of {step} up to 512 for {'one query row' if decodes else 'many query rows'}"
            f", not {size}",
        )
        require_dtype(name, "block_table", table, (torch.int32,))
        require(
            table.dim() == 2 and table.shape[0] == query.shape[0],
            name,
            f"block_table must be [{query.shape[0]}, blocks of an entry], not {list(table.shape)}",
        )
        require(
            key.shape == value.shape, name, f"paged key {list(key.shape)} and value {list(value.shape)} must be alike"
        )
        if key.dim() == 3:
            in_blocks = key.shape[1] == size
            require(key.shape[2] <= WIDEST_ROW, name, f"[blocks, block_size, H] needs H <= 65535, not {key.shape[2]}")
        else:
            in_blocks = self.layout == "BNSD" and key.dim() == 4 and key.shape[2] == size
        require(
            in_blocks,
            name,
            f"the cache must be [blocks, {size}, H] (block_size {size}), or for query in BNSD [blocks, N, {size}, D], "
            f"not {list(key.shape)}",
        )
        require(key.numel() <= MOST_ELEMENTS, name, f"the cache {list(key.shape)} must have fewer than 2**31 elements")
        needed = [-(-length // size) for length in self._lengths()]
        require(
            sum(needed) <= key.shape[0],
            name,
            f"the cache must have as many blocks as the entries need together, {sum(needed)}, not {key.shape[0]}",
        )

    def _lengths(self) -> list[int]:
        lengths = given(self.lengths, self.operator, "block_table needs actual_seq_lengths_kv")
        capacity = self.table.shape[1] * self.block_size
        return [
            length_of(self.operator, "actual_seq_lengths_kv", lengths, index, capacity)
            for index in range(self.table.shape[0])
        ]

    def gathered(self, cache: Tensor) -> Tensor:
        """Every entry's keys in `layout`, as long as the table."""
        rows = cache if cache.dim() == 3 else cache.transpose(1, 2).flatten(2)
        table = self.table.long()
        joined = torch.zeros(table.shape[0], table.shape[1] * self.block_size, rows.shape[2], dtype=cache.dtype)
        for index, length in enumerate(self._lengths()):
            used = table[index, : -(-length // self.block_size)]
            if values_count():
                require(
                    bool(((used >= 0) & (used < rows.shape[0])).all()),
                    self.operator,
                    f"block_table row {index} points beyond the {rows.shape[0]} blocks of the cache",
                )
            joined[index, :length] = rows[used.clamp(0, rows.shape[0] - 1)].flatten(0, 1)[:length]
        if self.layout == "BSH":
            return joined
        heads = joined.unflatten(-1, (self.key_heads, -1))
        return heads if self.layout == "BSND" else heads.transpose(1, 2).contiguous()

    def trimmed(self, argument: str, given_for_keys: Tensor | None) -> Tensor | None:
        """A mask or bias up to the table's last key, which it must reach."""
        if given_for_keys is None:
            return None
        capacity = self.table.shape[1] * self.block_size
        require(
            given_for_keys.shape[-1] >= capacity,
            self.operator,
            f"{argument} must reach the end of block_table, {capacity} keys, not {given_for_keys.shape[-1]}",
        )
        return given_for_keys[..., :capacity]


def length_of(operator: str, argument: str, lengths: Sequence[int] | None, index: int, longest: int) -> int:
    if lengths is None:
        return longest
    if len(lengths) == 1:  # one length serves the whole batch
        index = 0
    length = int(lengths[index]) if index < len(lengths) else -1
    require(
        0 <= length <= longest,
        operator,
        f"{argument} must be one length of at most {longest} for each entry of the batch, not {list(lengths)}",
    )
    return length
