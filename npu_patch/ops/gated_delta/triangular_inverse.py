"""The inverse of unit lower triangular matrices, by blocks.

With blocks of half the size, (I + A)^-1 has the inverses of the two diagonal blocks on its diagonal and
-inverse_22 A_21 inverse_11 below it. Doubling the blocks from 1 x 1 upward takes log2(C) levels of batched products,
where substitution takes C steps; the values are those of block substitution. (The product (I - A)(I + A²)(I + A⁴)...
takes as few, but powers of A grow like binomials: for equal keys without decay they lose every digit at C = 64.)
"""

from __future__ import annotations

import torch
from torch import Tensor

BASE = 16


def unit_lower_inverse(a: Tensor) -> Tensor:
    """(I + A)^-1 for A `[n, C, C]`, of which only the part below the diagonal is read. C is a power of two."""
    n, c, _ = a.shape
    base = min(c, BASE)
    blocks = c // base
    if blocks == 1:
        return _by_masked_doubling(a)
    diagonal = a.view(n, blocks, base, blocks, base).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    inverse = torch.zeros_like(a)
    inverse.view(n, blocks, base, blocks, base).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).copy_(
        _by_masked_doubling(diagonal.reshape(-1, base, base)).view(n, blocks, base, base)
    )
    size = base
    while size < c:
        for start in range(0, c, 2 * size):
            upper, lower = slice(start, start + size), slice(start + size, start + 2 * size)
            below = torch.bmm(a[:, lower, upper], inverse[:, upper, upper])
            corner = inverse[:, lower, upper]  # zeros so far
            corner.baddbmm_(inverse[:, lower, lower], below, alpha=-1)
        size *= 2
    return inverse


def _by_masked_doubling(a: Tensor) -> Tensor:
    """The same for small C: every level on whole matrices, as blocks of a few elements are too small for products."""
    c = a.shape[-1]
    position, level = torch.arange(c, device=a.device), torch.arange(c.bit_length() - 1, device=a.device)
    # Below the diagonal, the blocks that level l inverts away are where the highest bit of row xor column is l.
    corners = ((position[:, None] ^ position) >> level[:, None, None]) == 1
    below = a.tril(-1) * corners[:, None]
    inverse = torch.eye(c, dtype=a.dtype, device=a.device).expand_as(a)
    for at_level in below[:1]:  # blocks of one element are their own inverses
        inverse = inverse - at_level
    for at_level in below[1:]:
        inverse = torch.baddbmm(inverse, inverse, torch.bmm(at_level, inverse), alpha=-1)
    return inverse
