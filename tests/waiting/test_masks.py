"""Masks that stay patterns: what they are to others, which mask functions they are made for, what is remembered."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from npu_patch import Report
from npu_patch.ops.attention.band import Band
from npu_patch.serving.once_per_step import HostReads, OncePerTensor
from npu_patch.waiting.masks import Pattern, PatternMask, read_mask_function
from tests.ops.attention.test_attention import attend, outcome, report  # noqa: F401
from tests.support.attention_cases import Case, exact

CASE = Case(window=4)


def pattern_mask(npu: torch.device) -> PatternMask:
    mask = CASE.mask("sdpa", npu)
    assert type(mask) is PatternMask and mask._built is None
    return mask


READINGS: dict[str, Callable[[Tensor], Any]] = {
    "slice": lambda mask: mask[:, :, 2:5, :7],
    "to float": lambda mask: mask.float(),
    "where": lambda mask: torch.where(mask, 0.0, -1.0),
    "not": lambda mask: ~mask,
    "concatenation": lambda mask: torch.cat((mask, mask), -1),
    "expand": lambda mask: mask.expand(2, 3, 11, 11),
    "to the host": lambda mask: mask.cpu(),
    "sum": lambda mask: mask.sum(-1),
    "item": lambda mask: torch.tensor(mask[0, 0, 3, 0].item()),
    "list": lambda mask: torch.tensor(mask.tolist()),
    "clone": lambda mask: mask.clone(),
}


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_to_others_it_is_the_mask_that_transformers_makes(reading: str, mode: Any, npu: torch.device) -> None:
    with mode():
        result = READINGS[reading](pattern_mask(npu))
        assert type(result) is Tensor
        assert torch.equal(result.cpu(), READINGS[reading](CASE.seen()))


@pytest.mark.usefixtures("report")
def test_looking_at_its_shape_writes_nothing_out(npu: torch.device) -> None:
    mask = pattern_mask(npu)
    assert (mask.shape, mask.dtype, mask.device, mask.dim(), len(mask)) == ((2, 1, 11, 11), torch.bool, npu, 4, 2)
    assert isinstance(mask, Tensor) and not mask.requires_grad and "PatternMask" in repr(mask)
    assert mask._built is None and mask.pattern == Pattern(Band(3, 0))


@pytest.mark.parametrize("write", ["in place", "through a view"])
def test_a_mask_that_somebody_wrote_to_is_what_they_wrote(
    write: str,
    report: Report,  # noqa: F811
    npu: torch.device,
) -> None:
    case = Case(batch=1, window=4)
    mask, expected = case.mask("sdpa", npu), case.seen()
    assert mask.pattern is not None
    for each in (mask, expected):
        if write == "in place":
            each.logical_and_(torch.arange(11, device=each.device) != 5)
        else:
            each[:, :, 6:, 5].fill_(False)
    given = case.tensors()
    out = attend(case, mask, [tensor.to(npu) for tensor in given])
    torch.testing.assert_close(out.cpu(), exact(*given, expected))


@pytest.mark.usefixtures("report")
def test_reentrant_checkpointing_keeps_the_pattern(npu: torch.device) -> None:
    assert pattern_mask(npu).detach().pattern == Pattern(Band(3, 0))


def test_bands_and_packing_are_read() -> None:
    from transformers import masking_utils as mu

    indices, positions = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]])
    windowed = mu.sliding_window_causal_mask_function(5)
    packed = mu.packed_sequence_compatibility_function(windowed, positions, indices)
    for function, before, after in (
        (mu.causal_mask_function, None, 0),
        (mu.bidirectional_mask_function, None, None),
        (windowed, 4, 0),
        (mu.sliding_window_bidirectional_mask_function(5), 5, 5),
        (mu.and_masks(windowed, mu.sliding_window_overlay(3)), 2, 0),
        (packed, 4, 0),
    ):
        reading = read_mask_function(function)
        assert (reading.before, reading.after) == (before, after)
        assert (reading.packed_indices is indices) == (function is packed)


def test_other_mask_functions_are_not_read() -> None:
    from transformers import masking_utils as mu

    def imitation(batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
        return kv_idx <= q_idx

    for function in (
        mu.or_masks(mu.causal_mask_function, mu.bidirectional_mask_function),
        mu.and_masks(mu.causal_mask_function, imitation),
        mu.chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long)),
        mu.blockwise_overlay(torch.zeros(1, 3)),
        mu.padding_mask_function(torch.ones(1, 3)),
        imitation,
        len,
    ):
        assert read_mask_function(function) is None


def test_masks_of_no_known_pattern_are_transformers_own(report: Report, npu: torch.device) -> None:  # noqa: F811
    from transformers import LlamaConfig, masking_utils

    config = LlamaConfig(hidden_size=8, num_attention_heads=1, attn_implementation="sdpa")
    embeds = torch.empty(1, 6, 8, device=npu)
    blocks = torch.tensor([[0, 0, 0, -1, -1, -1]], device=npu)
    mask = masking_utils.create_causal_mask(config, embeds, None, None, block_sequence_ids=blocks)
    assert type(mask) is Tensor and bool(mask[0, 0, 0, 2]) and not bool(mask[0, 0, 3, 4])
    reasons = outcome(report, "AttentionMaskInterface['sdpa']").calls.fell_through
    assert reasons == {"a mask function that is no band": 1}


def test_once_per_tensor() -> None:
    once, made = OncePerTensor(), []

    def make() -> int:
        made.append(len(made))
        return made[-1]

    first, second = torch.zeros(3), torch.zeros(3)
    assert [once.of((first,), make) for _ in range(3)] == [0, 0, 0]
    assert once.of((second,), make) == 1  # equal, but not the same
    assert once.of((first, second), make) == 2
    assert once.of((first, second), make) == 2
    first.add_(1)
    assert once.of((first, second), make) == 3
    second.add_(1)
    assert once.of((first, second), make) == 4
    with torch.inference_mode():
        unversioned = torch.zeros(3)
        assert [once.of((unversioned,), make) for _ in range(2)] == [5, 6]
    alive = weakref.ref(first)
    del first
    gc.collect()
    assert alive() is None  # remembering it does not keep it
    assert len(once._kept) == 1


@pytest.mark.parametrize(
    "rows", [[[0, 1, 2, 0, 1, 0]], [[0, 1, 2, 3, 4, 5], [4, 5, 0, 1, 2, 3]], [[7, 8, 9, 10, 11, 12]]], ids=str
)
def test_packed_positions_are_numbered_as_transformers_numbers_them(rows: list[list[int]], npu: torch.device) -> None:
    from transformers.masking_utils import find_packed_sequence_indices

    positions, reads = torch.tensor(rows), HostReads()
    expected, found = find_packed_sequence_indices(positions), reads.packed_indices(positions.to(npu))
    if expected is None:
        assert found is None
        return
    assert torch.equal(found.cpu(), expected)
    sequence = (expected + torch.arange(len(rows))[:, None] * 100).flatten()
    _, lengths = sequence.unique_consecutive(return_counts=True)
    assert reads.ends_of_packed(found) == tuple(lengths.cumsum(0).tolist())
    assert reads.ends_of_packed(found.clone()) is None
