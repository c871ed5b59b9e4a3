"""Whether what stands in transformers' attention registries is what its name says.

The registries are open: another package may have put its own function under `sdpa`. Each of these observes a function
on a few small CPU tensors: it is what it should be, or not read.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.closeness import distance
from npu_patch.numerics.error_text import error_text
from npu_patch.numerics.findings import unless_accident
from npu_patch.numerics.room import quiet_room
from npu_patch.numerics.values import values
from npu_patch.ops.attention.band import CAUSAL_TOP_LEFT, FULL, Band
from npu_patch.ops.readings import AsNamed, NotRead

REGISTRY = "ALL_ATTENTION_FUNCTIONS"  # as modeling files hold AttentionInterface
BATCH, HEADS, KEY_HEADS, QUERIES, KEYS, HEAD_DIM, VALUE_DIM = 2, 6, 2, 3, 5, 8, 4
SCALE = 0.3


def read_attention(function: Callable[..., Any]) -> AsNamed | NotRead:
    """It should compute grouped attention: causal from the top left without a mask, else what a bool mask shows."""
    with quiet_room():
        shown = Band(before=1, after=2, bottom_right=False).visible(QUERIES, KEYS).expand(BATCH, 1, -1, -1)
        causal = CAUSAL_TOP_LEFT.visible(QUERIES, KEYS)
        cases: tuple[tuple[str, Tensor | None, dict[str, Any], Tensor], ...] = (
            ("without a mask", None, {}, causal),
            ("bidirectional", None, {"is_causal": False}, FULL.visible(QUERIES, KEYS)),
            ("with a bool mask", shown, {}, shown),
        )
        for what, mask, keywords, seen in cases:
            for dtype in (torch.float32, torch.bfloat16):
                try:
                    apart = _distance(function, mask, keywords, seen, dtype)
                except Exception as problem:
                    unless_accident(problem)
                    return NotRead(f"{what} it fails: {error_text(problem)}")
                if apart > 1.0:
                    return NotRead(f"{what} it computes no scaled dot-product attention")
    return AsNamed("scaled dot-product attention")


def read_mask(function: Callable[..., Any]) -> AsNamed | NotRead:
    """It should make bool masks `[B, 1, Sq, Skv]`, True where the mask function says so."""
    from transformers.masking_utils import sliding_window_causal_mask_function

    arguments = {"batch_size": 2, "kv_length": 4, "local_size": 2, "attention_mask": None}
    problems = []
    with quiet_room():
        expected = Band(before=1, after=0).visible(4, 4).expand(2, 1, 4, 4)
        # The queries by their number or, up to transformers 5.3, by their positions.
        for queries in ({"q_length": 4}, {"cache_position": torch.arange(4)}):
            try:
                made = function(mask_function=sliding_window_causal_mask_function(2), **queries, **arguments)
            except Exception as problem:
                unless_accident(problem)
                problems.append(f"it fails: {error_text(problem)}")
                continue
            same = isinstance(made, Tensor) and made.dtype == torch.bool and made.shape == expected.shape
            right = same and torch.equal(made, expected)
            return AsNamed("bool mask") if right else NotRead("it makes other masks than bool ones, True where seen")
    return NotRead(problems[0])


def read_packing(function: Callable[..., Any]) -> AsNamed | NotRead:
    """It should number the packed sequences of position ids. Where there is one in each row, its callers take None for
    an answer; transformers 4 numbers them nevertheless."""
    with quiet_room():
        packed, plain = torch.tensor([[0, 1, 2, 0, 1, 0], [3, 4, 5, 6, 7, 8]]), torch.arange(6)[None]
        expected = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
        try:
            numbered, nothing = function(packed), function(plain)
        except Exception as problem:
            unless_accident(problem)
            return NotRead(f"it fails: {error_text(problem)}")
        same = isinstance(numbered, Tensor) and numbered.dtype == expected.dtype and torch.equal(numbered, expected)
        one_each = nothing is None or (isinstance(nothing, Tensor) and not nothing.any())
        return AsNamed("packed position ids") if same and one_each else NotRead("it does not number packed sequences")


def read_preparing(function: Callable[..., Any]) -> AsNamed | NotRead:
    """Its second result should be the padding mask as truth values."""
    with quiet_room():
        padding = torch.tensor([[0, 1, 2, 0]])
        config, embeds = SimpleNamespace(_attn_implementation="sdpa"), torch.zeros(1, 4, 2)
        known = {
            "config": config,
            "inputs_embeds": embeds,
            "input_embeds": embeds,  # up to transformers 5.0
            "attention_mask": padding,
            "cache_position": torch.arange(4),
        }
        try:
            made = function(**{name: known.get(name) for name in inspect.signature(function).parameters})[1]
        except Exception as problem:
            unless_accident(problem)
            return NotRead(f"it fails: {error_text(problem)}")
        same = isinstance(made, Tensor) and made.dtype == torch.bool and torch.equal(made, padding.bool())
        return (
            AsNamed("padding mask as truth values") if same else NotRead("it makes no truth values of a padding mask")
        )


def _distance(
    function: Callable[..., Any], mask: Tensor | None, keywords: dict[str, Any], seen: Tensor, dtype: torch.dtype
) -> float:
    module = SimpleNamespace(num_key_value_groups=HEADS // KEY_HEADS, is_causal=True, training=True)
    shapes = (
        (BATCH, HEADS, QUERIES, HEAD_DIM),
        (BATCH, KEY_HEADS, KEYS, HEAD_DIM),
        (BATCH, KEY_HEADS, KEYS, VALUE_DIM),
    )
    inputs, expected_inputs = (
        [values(shape, 60 + index, dtype, grad=True) for index, shape in enumerate(shapes)] for _ in range(2)
    )
    out, _ = function(module, *inputs, attention_mask=mask, dropout=0.0, scaling=SCALE, **keywords)
    query, key, value = expected_inputs
    return distance([out], [_reference(query, key, value, seen)], inputs, expected_inputs)


def _reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
    """`[B, Sq, N, Dv]`, computed in float32 and rounded once."""
    key, value = (t.float().repeat_interleave(HEADS // KEY_HEADS, 1) for t in (key, value))
    scores = (query.float() @ key.mT * SCALE).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).to(query.dtype)
