"""Forms that older transformers versions have, written as those versions call them."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor | None = None, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """4.x: positions come fifth, and are ignored."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def apply_multimodal_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, mrope_section: list[int], unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """Up to 5.16: tables `[3, B, S, D]` for temporal, height and width positions."""
    sections = mrope_section * 2
    cos, sin = (
        torch.cat([part[index % 3] for index, part in enumerate(table.split(sections, -1))], -1).unsqueeze(
            unsqueeze_dim
        )
        for table in (cos, sin)
    )
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


class Holder(torch.nn.Module):
    """So that `apply(model)` looks at this file."""


Q, K = (2, 6, 9, 32), (2, 2, 9, 32)
POSITIONS = torch.arange(9)[None]
CALLS: dict[str, tuple[str, tuple[int, ...], tuple[Any, ...], dict[str, Any]]] = {
    "fifth positional": ("apply_rotary_pos_emb", (2, 9, 32), (POSITIONS,), {}),
    "positions by name": ("apply_rotary_pos_emb", (2, 9, 32), (), {"position_ids": POSITIONS}),
    "dimension by name": ("apply_rotary_pos_emb", (2, 9, 32), (), {"unsqueeze_dim": 1}),
    "sections": ("apply_multimodal_rotary_pos_emb", (3, 2, 9, 32), ([4, 6, 6],), {}),
    "sections by name": ("apply_multimodal_rotary_pos_emb", (3, 2, 9, 32), (), {"mrope_section": [4, 6, 6]}),
}


@pytest.mark.parametrize("call", CALLS)
def test_older_calls_run_the_kernel_and_agree(call: str, npu: torch.device) -> None:
    name, table, args, kwargs = CALLS[call]
    cos, sin = torch.randn(2, *table, device=npu)
    q, k = (torch.randn(shape, device=npu, requires_grad=True) for shape in (Q, K))
    module = sys.modules[__name__]

    def outputs_and_gradients() -> list[Tensor]:
        rotated = getattr(module, name)(q, k, cos, sin, *args, **kwargs)
        return [*rotated, *torch.autograd.grad(rotated, (q, k), [torch.ones_like(x) for x in rotated])]

    expected = outputs_and_gradients()
    with npu_patch.applied(Holder()) as report:
        found = outputs_and_gradients()
    (outcome,) = [outcome for outcome in report.patched if outcome.site.endswith("." + name)]
    assert outcome.calls.ran == 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_sections_that_do_not_fit_reach_the_original(npu: torch.device) -> None:
    module = sys.modules[__name__]
    cos, sin = torch.randn(2, 3, 2, 9, 32, device=npu)
    q, k = (torch.randn(shape, device=npu) for shape in (Q, K))
    with npu_patch.applied(Holder()), pytest.raises(RuntimeError, match="split"):
        module.apply_multimodal_rotary_pos_emb(q, k, cos, sin, [4, 6, 7])
