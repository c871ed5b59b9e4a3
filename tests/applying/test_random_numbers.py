"""A seed gives the same adapters with the patches and without: apply() draws nothing, whatever it observes does."""

from __future__ import annotations

import importlib
import random
from typing import Any

import numpy as np
import pytest
import torch

import npu_patch

# Whose forwards draw: drop paths, layers that are left out by chance (by numpy's numbers), jitter of routers.
DRAWING = ("swin", "timesformer", "wav2vec2", "vitdet", "qwen3_moe", "switch_transformers")


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


@pytest.mark.parametrize("family", DRAWING)
def test_apply_draws_no_random_numbers(family: str) -> None:
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    before = states()
    with npu_patch.applied(device="cpu"):
        importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        npu_patch.apply(device="cpu")
        assert states() == before
