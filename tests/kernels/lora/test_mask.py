"""The masks of the kernels of adapters, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.lora.mask_kernel import mask


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5])
@pytest.mark.parametrize("seed", [0, 1, 2**40, 5874934615388537135])
def test_masks_are_fair_and_independent(dropout: float, seed: int) -> None:
    """Of each adapter, of neighbouring rows, columns and seeds, and of the adapters of a group: within 5 deviations."""
    rows, width = 300, 500
    masks = [mask(torch.tensor([seed]), index, rows, width, dropout) for index in range(3)]
    masks.append(mask(torch.tensor([seed + 1]), 0, rows, width, dropout))
    deviation = (dropout * (1 - dropout)) ** 0.5
    drawn = [(each.double() - (1 - dropout)) / deviation for each in masks]
    normals = {}
    for index, one in enumerate(drawn):
        normals[index, "all"] = one.sum() / one.numel() ** 0.5
        normals[index, "a row"] = (one.sum(1) / width**0.5).square().sub(1).sum() / (2 * rows) ** 0.5
        normals[index, "a column"] = (one.sum(0) / rows**0.5).square().sub(1).sum() / (2 * width) ** 0.5
        for name, left, right in (
            ("next row", one[:-1], one[1:]),
            ("next column", one[:, :-1], one[:, 1:]),
            ("four of a square", one[:-1, :-1] * one[1:, 1:], one[:-1, 1:] * one[1:, :-1]),
        ):
            normals[index, name] = (left * right).sum() / left.numel() ** 0.5
        for other in range(index):
            normals[index, other] = (one * drawn[other]).sum() / one.numel() ** 0.5
    assert all(abs(value) < 5 for value in normals.values()), {k: v for k, v in normals.items() if abs(v) >= 5}


def test_a_mask_does_not_depend_on_the_tiles() -> None:
    seed = torch.tensor([12345678901234567])
    small = mask(seed, 1, 70, 90, 0.3, block=16)
    assert torch.equal(small, mask(seed, 1, 70, 90, 0.3, block=64))
    assert torch.equal(small[:, :50], mask(seed, 1, 70, 50, 0.3))
