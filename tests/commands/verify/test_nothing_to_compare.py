"""verify, where no result of a model can be compared."""

from __future__ import annotations

import torch

from npu_patch.commands.verify.command import Verified, _compare, _whole


def test_a_model_whose_results_are_nan_in_float64_too_fails_and_says_so():
    model, found = torch.nn.Linear(2, 2), Verified("float32")
    results = {"loss": torch.tensor(float("nan"), dtype=torch.float64)}
    _compare(model, 0, results, results, results, found)
    check = _whole("Linear", torch.float32, found)
    assert check.failure == "nothing to compare"
