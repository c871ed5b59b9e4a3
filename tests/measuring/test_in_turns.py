"""Times of several forms are taken in turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import pytest
import torch

from npu_patch.measuring import measure
from npu_patch.measuring.in_turns import in_turns
from npu_patch.ops import token_losses
from npu_patch.ops.token_losses import TOKEN_LOSSES
from npu_patch.serving.case import Alternative


def test_samples_are_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], []
    monkeypatch.setattr("npu_patch.measuring.in_turns.time.perf_counter", lambda: now[0])

    def form(name: str, seconds: list[float]) -> None:
        order.append(name)
        now[0] += seconds.pop(0) if len(seconds) > 1 else seconds[0]

    slow, fast = [9.0] * 4 + [4.0, 1.0, 2.0, 3.0], [9.0] * 4 + [0.5]
    forms = {"slow": lambda: form("slow", slow), "fast": lambda: form("fast", fast)}
    found = in_turns(forms, torch.device("cpu"), samples=4)
    assert order[-8:] == ["slow", "fast"] * 4
    assert (found["slow"].low, found["slow"].median, found["slow"].high) == (1750.0, 2500.0, 3250.0)
    assert found["fast"].median == 500.0 and found["fast"].peak is None


def test_a_case_without_gradients_is_timed_by_its_forward() -> None:
    """The loss of a chunk makes its gradient in its forward."""
    case, (usual,) = (
        token_losses.case(16),
        [each for each in TOKEN_LOSSES.implementations if "cpu" in each.device_types],
    )
    alternative = Alternative(usual.name, torch.no_grad()(usual.run), usual.unsupported)
    assert not case.differentiated
    found = measure.times(case, [alternative], torch.device("cpu"), measure.clock(torch.device("cpu")))[usual.name]
    assert found.wrong is None and found.seconds is not None and found.seconds > 0.0
