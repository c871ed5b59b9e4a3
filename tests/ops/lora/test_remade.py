"""A down projection with adapters keeps gate and up of its layer, which are kept anyway, in place of their product."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch import simulator
from npu_patch.patches import swiglu
from tests.support.lora_models import PRECISIONS, Precision, a_step, adapted_model
from tests.support.needs_triton import needs_triton
from tests.support.tiny_models import COMMON, tiny, tiny_batch
from tests.support.training_modes import MODES

LAYERS, TOKENS, WIDTH = 2, tiny_batch()["input_ids"].numel(), COMMON["intermediate_size"]
TRITON = [False, pytest.param(True, marks=needs_triton)]
PRODUCTS = "swiglu"  # whatever makes the product, operator or kernel: its forward's name

pytestmark = pytest.mark.usefixtures("two_cores")


@pytest.fixture(autouse=True)
def worth_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few bytes the products of tiny models have."""
    monkeypatch.setattr(swiglu, "LEAST_BYTES", 0)


def held(model: torch.nn.Module, precision: Precision) -> int:
    """Bytes that a forward leaves on the device."""
    batch = {name: each.to("npu") for name, each in tiny_batch().items()}
    gc.collect()
    before = torch.npu.memory_allocated()
    with precision.around("npu"):
        loss = model(**batch, use_cache=False).loss
    gc.collect()
    found = torch.npu.memory_allocated() - before
    del loss
    return found


@pytest.mark.parametrize("triton", TRITON)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", PRECISIONS)
def test_products_are_not_kept_and_every_gradient_is_the_same(
    name: str, dropout: float, triton: bool, npu: torch.device
) -> None:
    precision = PRECISIONS[name]
    model = adapted_model("qwen3", dropout, precision).to(npu)
    steps, bytes_held = [], []
    for recompute in (False, "auto"):
        with npu_patch.applied(model, triton=triton, swiglu_recompute=recompute):
            steps.append(a_step(model, precision))
            bytes_held.append(held(model, precision))
    size = 2 if precision.autocast or precision.model is torch.bfloat16 else 4
    assert bytes_held[0] - bytes_held[1] >= LAYERS * TOKENS * WIDTH * size
    assert steps[0].keys() == steps[1].keys()
    assert all(torch.equal(steps[0][key], steps[1][key]) for key in steps[0])


@pytest.mark.parametrize("triton", TRITON)
@pytest.mark.parametrize("mode", ["plain", "non-reentrant", "reentrant"])
def test_checkpointed_it_computes_what_it_computes_otherwise(mode: str, triton: bool, npu: torch.device) -> None:
    precision = PRECISIONS["bfloat16, float32 adapters"]
    model = adapted_model("qwen3", 0.3, precision).to(npu)
    steps = []
    for recompute in (False, "auto"):
        around = MODES[mode](model) if mode != "plain" else contextlib.nullcontext()
        with npu_patch.applied(model, triton=triton, swiglu_recompute=recompute), around:
            steps.append(a_step(model, precision))
    assert all(torch.equal(steps[0][key], steps[1][key]) for key in steps[0])


def products_made(model: torch.nn.Module, **switches: Any) -> int:
    with npu_patch.applied(model, **switches):
        a_step(model)
        with simulator.count() as counted:
            a_step(model)
    return sum(
        launches
        for name, (launches, _) in counted.by_op.items()
        if PRODUCTS in name and not any(word in name for word in ("backward", "grad"))
    )


@pytest.mark.parametrize("triton", TRITON)
def test_each_product_is_made_once_more(triton: bool, npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    model = adapted_model("qwen3").to(npu)
    assert products_made(model, triton=triton, swiglu_recompute=False) == LAYERS
    assert products_made(model, triton=triton) == 2 * LAYERS


@pytest.mark.parametrize("kind", ["no adapters", "adapters elsewhere", "small products"])
def test_nothing_is_made_again_where_that_spares_nothing_or_little(
    kind: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    if kind == "small products":
        monkeypatch.undo()
        model = adapted_model("qwen3").to(npu)
    else:
        model = tiny("qwen3").train()
        if kind == "adapters elsewhere":
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "gate_proj"]))
        model = model.to(npu)
    assert products_made(model, triton=False) == LAYERS
