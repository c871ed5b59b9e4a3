"""Adapters of a head, or of embeddings that share its weight, merged while its logits wait; and what the report says of
a layer whose product waits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch.waiting.origins import ReadTooLate
from tests.patches.loss.test_loss import calls_of, model_of, only_the_loss
from tests.support.gradients import relative_error
from tests.support.lora_models import fell_through
from tests.support.tiny_models import tiny_batch

WRAPPED = {"the head": ("qwen3", "lm_head"), "tied embeddings": ("llama, tied", "embed_tokens")}


def adapted(name: str, target: str, npu: torch.device) -> Any:
    model = model_of(name)
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", target], init_lora_weights=False)
    return get_peft_model(model, config).to(npu)


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_logits_that_wait_while_adapters_are_merged_are_not_read_with_other_weights(
    wrapped: str, npu: torch.device
) -> None:
    model = adapted(*WRAPPED[wrapped], npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    expected = model(**batch).logits
    with only_the_loss(model):
        early, late = model(**batch), model(**batch)
        assert torch.equal(early.logits.argmax(-1), expected.argmax(-1))
        model.merge_adapter()
        assert torch.equal(early.logits, expected)
        with pytest.raises(ReadTooLate, match="adapters were merged into the weight"):
            late.logits.argmax(-1)
        merged = model(**batch)
        model.unmerge_adapter()
        assert relative_error(late.logits, expected) < 1e-5  # as peft's arithmetic left the weight
        with pytest.raises(ReadTooLate, match="or taken out of it"):
            merged.logits.argmax(-1)


def test_a_head_whose_product_waits_says_so(npu: torch.device) -> None:
    model = adapted("qwen3", "lm_head", npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    report = npu_patch.apply(model)
    model(**batch).loss.backward()
    assert fell_through(report) == {"its product waits for the loss": 1}
    assert calls_of(report) == ({"forward": 1, "loss": 1}, {})
    handle = model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(
        lambda *call: None
    )
    model(**batch)
    handle.remove()
    assert fell_through(report)["hooks on base_layer"] == 1
