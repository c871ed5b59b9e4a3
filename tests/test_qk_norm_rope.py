"""QK-norm with RoPE in one kernel: attention layers compute what they did, and everything else is left to them."""

from __future__ import annotations

import copy
import importlib
import math
import statistics
import types
from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import npu_patch
from npu_patch import deferred_norm
from npu_patch.outcome import Outcome, Report
from tests.gradients import in_float64, loss_and_gradients, relative_error, token_losses
from tests.tiny_models import tiny, tiny_batch

pytest.importorskip("triton")
FAMILIES = ("qwen3", "qwen3_moe", "glm4_moe", "gemma3", "qwen3_next", "qwen3_5")
LAYERS = {"qwen3_next": 1, "qwen3_5": 1}  # with full attention, of 2
ALL_EXPERTS = {"qwen3_moe": 5, "qwen3_next": 5, "glm4_moe": 6}


def fused(report: Report) -> Outcome:
    (outcome,) = [each for each in report.patched if each.patch == "qk_norm_rope" and each.layers]
    return outcome


def built(family: str, lora: bool = False, **overrides: object) -> nn.Module:
    model = tiny(family, **overrides)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False)
        )
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_in_float32(family: str, lora: bool, npu: torch.device) -> None:
    """To 1e-6 of the original, as tests/test_parity.py; a gradient that float32 cannot tell so well is as near to
    float64 as the original's."""
    model, batch = built(family, lora), tiny_batch(length=5)
    exact = loss_and_gradients(in_float64(model), batch)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert not report.failed
    assert fused(report).calls.ran == LAYERS.get(family, 2)
    assert not fused(report).calls.fell_through
    assert patched.keys() == original.keys()
    for name in original:
        error = relative_error(patched[name], original[name])
        if error >= 1e-6:
            assert relative_error(patched[name], exact[name]) < 5 * relative_error(original[name], exact[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_no_further_from_float64_than_the_original(family: str, npu: torch.device) -> None:
    """At most 1.1 times, over several models: see tests/test_parity.py."""
    overrides = {"num_experts_per_tok": ALL_EXPERTS[family]} if family in ALL_EXPERTS else {}
    loss_errors = {"original": 0.0, "patched": 0.0}
    ratios: list[float] = []
    for seed in range(16):
        model = built(family, seed=seed, **overrides).bfloat16()
        batch = tiny_batch(length=13, seed=seed)
        exact_model = in_float64(model)
        exact, exact_losses = loss_and_gradients(exact_model, batch), token_losses(exact_model, batch["input_ids"])
        model = model.to(npu)
        errors: dict[str, list[float]] = {}
        for which in ("original", "patched"):
            with npu_patch.applied(model, triton=True, patch=which == "patched"):
                found = loss_and_gradients(model, batch)
                losses = token_losses(model, batch["input_ids"])
            loss_errors[which] += float((losses - exact_losses).square().sum())
            errors[which] = [relative_error(found[name], exact[name]) for name in exact if exact[name].any()]
        pairs = zip(errors["patched"], errors["original"], strict=True)
        ratios += [mine / own for mine, own in pairs if own > 0]
    assert math.sqrt(loss_errors["patched"] / loss_errors["original"]) < 1.1
    assert statistics.geometric_mean(ratios) < 1.1
