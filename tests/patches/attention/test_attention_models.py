"""The attention patch in whole models: training, packed batches, generation."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch import Report, simulator
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.tiny_models import FAMILIES, tiny, tiny_batch

SITE = "AttentionInterface['{}']"
ATTENTION_ONLY = dict.fromkeys(("rms_norm", "rope", "swiglu", "fla", "inference"), False)


@pytest.fixture
def report() -> Iterator[Report]:
    with npu_patch.applied(device="npu", **ATTENTION_ONLY) as applied:
        yield applied


def calls(report: Report, implementation: str) -> Any:
    return next(o for o in report if o.site == SITE.format(implementation)).calls


def padded(batch: dict[str, Tensor], side: str, count: int = 4) -> dict[str, Tensor]:
    mask = torch.ones_like(batch["input_ids"])
    mask[1, slice(0, count) if side == "left" else slice(-count, None)] = 0
    labels = torch.where(mask.bool(), batch["labels"], -100)
    if side == "left":
        labels[1, : count + 1] = -100  # predicted from padding
    return {**batch, "labels": labels, "attention_mask": mask}


def packed(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """All rows as one, as DataCollatorWithFlattening packs them."""
    rows, length = batch["input_ids"].shape
    labels = batch["labels"].clone()
    labels[:, 0] = -100
    positions = torch.arange(length).repeat(rows)
    return {
        "input_ids": batch["input_ids"].view(1, -1),
        "labels": labels.view(1, -1),
        "position_ids": positions[None],
        "use_cache": torch.tensor(False),
    }


BATCHES = {
    "whole": lambda: tiny_batch(length=13),
    "left padding": lambda: padded(tiny_batch(length=13), "left"),
    "right padding": lambda: padded(tiny_batch(length=13), "right"),
    "packed": lambda: packed(tiny_batch(length=13)),
}


def with_attention(model: torch.nn.Module, implementation: str) -> torch.nn.Module:
    model = copy.deepcopy(model)
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("implementation", ["sdpa", "npu", "flash_attention_2"])
@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3"])
def test_training_as_eager(family: str, implementation: str, batch: str, report: Report, npu: torch.device) -> None:
    model = tiny(family, attn_implementation="eager")
    given = BATCHES[batch]()
    expected = loss_and_gradients(model, given)
    actual = loss_and_gradients(with_attention(model.to(npu), implementation), given)
    assert set(actual) == set(expected)
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 2e-5
    counted = calls(report, implementation)
    assert counted.ran == 2 and not counted.fell_through


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("qwen3", "mistral", "gemma3")])
def test_every_family_trains_as_eager(family: str, report: Report, npu: torch.device) -> None:
    """The gradients of a gated delta net's decays, which float32 cannot tell so well, have their tests elsewhere."""
    model = tiny(family, attn_implementation="eager")
    given = padded(tiny_batch(length=13), "right")
    expected = loss_and_gradients(model, given)
    actual = loss_and_gradients(with_attention(model.to(npu), "sdpa"), given)
    # The experts of some families differ by more than attention does.
    names = [name for name in expected if not name.endswith(("dt_bias", "A_log", "in_proj_a.weight", "ba.weight"))]
    assert max(relative_error(actual[name], expected[name]) for name in names) < 1e-4
    assert calls(report, "sdpa").ran and not calls(report, "sdpa").fell_through


@pytest.mark.parametrize("checkpointing", [{"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_gradient_checkpointing(checkpointing: dict[str, bool], report: Report, npu: torch.device) -> None:
    model = tiny("mistral", attn_implementation="sdpa")
    given = packed(tiny_batch(length=13))
    expected = loss_and_gradients(model.train(), given)
    model.to(npu).gradient_checkpointing_enable(checkpointing)
    actual = loss_and_gradients(model, given)
    assert max(relative_error(actual[name], expected[name]) for name in expected) < 2e-5
    assert calls(report, "sdpa").ran == 4


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("implementation", ["sdpa", "flash_attention_2"])
@pytest.mark.parametrize("depth", [2, 5])
def test_packed_lengths_reach_the_host_once_whatever_the_depth(
    depth: int, implementation: str, report: Report, npu: torch.device
) -> None:
    model = tiny("qwen3", num_hidden_layers=depth, attn_implementation=implementation).to(npu)
    given = packed(tiny_batch(length=13))
    del given["use_cache"], given["labels"]
    on_device = {name: tensor.to(npu) for name, tensor in given.items()}
    with simulator.count() as counted:
        model(**on_device, use_cache=False).logits.sum().backward()
    assert counted.host_copies == 1
    assert calls(report, implementation).ran == depth


PROMPTS = {"whole": 0, "left padding": 5}


def generated(model: torch.nn.Module, cache: str, prompt: str, device: Any, tokens: int = 64) -> Tensor:
    ids = tiny_batch(length=17, seed=3)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, : PROMPTS[prompt]] = 0
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        max_new_tokens=tokens,
        do_sample=False,
        cache_implementation=cache,
    )
    assert out.shape == (2, 17 + tokens)
    return out.cpu()


@functools.cache
def eagerly(family: str, dtype: torch.dtype, cache: str, prompt: str) -> tuple[torch.nn.Module, Tensor]:
    model = tiny(family, attn_implementation="eager").to("npu:0", dtype)
    return model, generated(model, cache, prompt, "npu:0")


@pytest.mark.parametrize(
    "family, dtype, implementation, cache, prompt",
    [
        ("qwen3", torch.float32, "sdpa", "dynamic", "whole"),
        ("qwen3", torch.float32, "sdpa", "static", "left padding"),
        ("qwen3", torch.float16, "sdpa", "dynamic", "left padding"),
        ("qwen3", torch.float16, "sdpa", "static", "whole"),
        ("qwen3", torch.float16, "sdpa", "static", "left padding"),
        ("qwen3", torch.float16, "npu", "dynamic", "left padding"),
        ("mistral", torch.float32, "sdpa", "dynamic", "left padding"),
        ("mistral", torch.float32, "sdpa", "static", "left padding"),
        ("qwen3", torch.float16, "flash_attention_2", "dynamic", "left padding"),
        ("qwen3", torch.float16, "flash_attention_2", "static", "left padding"),
        ("mistral", torch.float32, "flash_attention_2", "dynamic", "left padding"),
    ],
    ids=str,
)
def test_generation_token_for_token(
    family: str,
    dtype: torch.dtype,
    implementation: str,
    cache: str,
    prompt: str,
    npu: torch.device,
) -> None:
    model, expected = eagerly(family, dtype, cache, prompt)
    assert len(expected[0, 17:].unique()) > 5  # a model that repeats itself would hide a wrong attention
    with npu_patch.applied(model, device="npu", **ATTENTION_ONLY) as report, simulator.count() as counted:
        actual = generated(with_attention(model, implementation), cache, prompt, npu)
    assert torch.equal(actual, expected)
    counter = calls(report, implementation)
    assert counter.ran == 2 * 64 and not counter.fell_through
    decoded, _ = counted.by_op.get("npu::npu_fused_infer_attention_score", (0, 0))
    assert decoded == (2 * 63 if dtype == torch.float16 else 0)  # the inference operator takes half precision only
