"""What a call was given is kept as it was, whatever the call changes."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from npu_patch.commands.replay.snapshot import snapshot


@pytest.mark.parametrize("lazily", [False, True], ids=["filled", "empty"])
def test_a_cache_is_copied_as_it_is_before_the_call(lazily: bool) -> None:
    cache = DynamicCache()
    if not lazily:
        cache.update(torch.ones(1, 2, 3, 4, requires_grad=True) * 2, torch.ones(1, 2, 3, 4), 0)
    length = cache.get_seq_length()
    kept = snapshot(cache)
    cache.update(torch.ones(1, 2, 5, 4, requires_grad=True) * 2, torch.ones(1, 2, 5, 4), 0)
    assert kept.get_seq_length() == length == cache.get_seq_length() - 5
    keys, _ = kept.update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert keys.shape[2] == length + 1 and cache.get_seq_length() == length + 5
    assert keys.grad_fn is None or length  # no history of the model's
