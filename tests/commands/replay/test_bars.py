"""The bars of `verify`: what is near enough, and what is said of what is not."""

from __future__ import annotations

import torch

from npu_patch.commands.replay.bars import Error, why_not


def test_the_bars() -> None:
    exact, coarse = torch.float32, torch.bfloat16
    assert why_not([Error("x", 9e-7, 1e-8)], exact) is None
    assert "accepted is 1.00e-06" in why_not([Error("x", 2e-6, 1e-8)], exact)
    assert why_not([Error("x", 1e-4, 5e-5)], exact) is None
    assert "x is 1.00e-03 from float64" in why_not([Error("x", 1e-3, 5e-5)], exact)
    assert why_not([Error("x", 2.1e-3, 2e-3)], coarse) is None
    assert "1.200 times as far" in why_not([Error("x", 2.4e-3, 2e-3)] * 3, coarse)
    assert "x is 1.00e-01" in why_not([Error("x", 1e-1, 2e-3), *[Error("y", 1e-3, 1e-2)] * 9], coarse)
    assert "cannot be judged: x of the original" in why_not([Error("x", 1.4, 1.4)], coarse)
    assert why_not([], coarse) == "nothing to compare"
