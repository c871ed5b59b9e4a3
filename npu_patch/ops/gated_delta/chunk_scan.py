"""The recurrence from chunk to chunk, `S' = M S + R`, in fewer steps than there are chunks.

The chunks are cut into groups. The M and R of whole groups are composed for all groups at once, the state runs from
group to group, and then through the chunks of all groups at once: 3 (L - 1) + G batched products instead of L G, for
G groups of L chunks, at up to three times the arithmetic. The state that enters a group is not computed once more as
what leaves the one before.

Chunks lie as `[L, G, ...]`: the chunk at [i, j] is the i-th of group j, so that one step of all groups is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor


def scan_forward(transitions: Tensor, states: Tensor, groups_known: bool = False) -> None:
    """Runs the recurrence in place.

    transitions: M, `[L, G, Z, K, K]`. states: `[L + 1, G, Z, K, V]`; it comes with R of chunk i in slot i + 1 and the
    first state in slot 0 of group 0, and leaves with the state entering chunk i in slot i and the last state in slot
    L of the last group. groups_known: it comes with the first state of every group in slot 0, and nothing is composed.
    """
    length, groups, z = transitions.shape[:3]
    m, s = transitions.flatten(1, 2), states.flatten(1, 2)
    last = (groups - 1) * z
    if groups > 1 and not groups_known:
        through, added = m[0, :last], s[1, :last]  # the last group's composition is not needed
        for i in range(1, length):
            added = torch.baddbmm(s[i + 1, :last], m[i, :last], added, out=s[0, z:] if i == length - 1 else None)
            through = torch.bmm(m[i, :last], through)
        if length == 1:
            s[0, z:].copy_(added)
        del added
        for j in range(groups - 1):
            here = slice(j * z, (j + 1) * z)
            s[0, (j + 1) * z : (j + 2) * z].baddbmm_(through[here], s[0, here])
        del through
    for i in range(length - 1):
        s[i + 1].baddbmm_(m[i], s[i])
    s[-1, last:].baddbmm_(m[-1, last:], s[-2, last:])


def scan_backward(transitions: Tensor, gradients: Tensor) -> None:
    """Runs the recurrence's transpose, `dS = Mᵀ dS' + B`, in place, from the last chunk to the first.

    gradients: `[L + 1, G, Z, K, V]`; it comes with B of chunk i in slot i and the gradient of the last state in slot L
    of the last group, and leaves with the gradient of the state leaving chunk i in slot i + 1 and that of the first
    state in slot 0 of group 0.
    """
    length, groups, z = transitions.shape[:3]
    m, d = transitions.flatten(1, 2).transpose(-1, -2), gradients.flatten(1, 2)
    if groups > 1:
        through, added = m[-1, z:], d[length - 1, z:]  # the first group's composition is not needed
        for i in range(length - 2, -1, -1):
            added = torch.baddbmm(d[i, z:], m[i, z:], added, out=d[-1, :-z] if i == 0 else None)
            through = torch.bmm(m[i, z:], through)
        if length == 1:
            d[-1, :-z].copy_(added)
        del added
        for j in range(groups - 1, 0, -1):
            here, before = slice(j * z, (j + 1) * z), slice((j - 1) * z, j * z)
            d[-1, before].baddbmm_(through[before], d[-1, here])
        del through
    for i in range(length - 1, 0, -1):
        d[i].baddbmm_(m[i], d[i + 1])
    d[0, :z].baddbmm_(m[0, :z], d[1, :z])
