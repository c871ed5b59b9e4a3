"""The reference of `verify` is float64, whatever casts are written in a model."""

from __future__ import annotations

import pytest
import torch

from npu_patch.commands.replay.float64 import everything_in_float64, in_float64
from tests.support.gradients import relative_error
from tests.support.tiny_models import tiny, tiny_batch


@pytest.mark.parametrize("family", ["qwen3_5", "gemma3"])
def test_the_reference_is_float64_all_through(family: str) -> None:
    """Twice as exact an input moves it by 1e-9 and no more: no cast to float32 is left."""
    model = tiny(family)
    batch = tiny_batch()
    with everything_in_float64():
        wide = in_float64(model)
        before = wide(**batch).loss
        with torch.no_grad():
            weight = next(p for n, p in wide.named_parameters() if n.endswith("norm.weight"))
            weight.mul_(1 + 1e-11)
        after = wide(**batch).loss
    assert before.dtype == torch.float64
    assert 0 < abs(float((after - before).detach())) < 1e-9
    assert relative_error(model(**batch).loss.detach().double(), before.detach()) < 1e-5
