"""What a step keeps for its backward: a patch never makes it more, whatever computes it."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import npu_patch
from npu_patch.kernels.readiness import why_not
from tests.support.tiny_models import tiny, tiny_batch

FAMILIES = ("qwen3", "llama", "gemma3", "qwen3_moe", "qwen3_5", "mixtral", "gpt_oss", "deepseek_v3")
ATTENTION = r".*self_attn\.(q_proj|o_proj|q_b_proj)"


def kept_bytes(model: torch.nn.Module) -> int:
    """Of storages that autograd keeps in a forward, parameters and buffers aside."""
    own = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    tensors = []  # or a freed storage's address would stand for two

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            tensors.append(tensor)
        return tensor

    batch = {name: each.to(next(model.parameters()).device) for name, each in tiny_batch().items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch).loss
    loss.backward()
    return sum(kept.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["npu", "cpu"])
def test_a_patched_step_keeps_no_more(family: str, device: str) -> None:
    model = get_peft_model(tiny(family).bfloat16(), LoraConfig(r=4, target_modules=ATTENTION)).train().to(device)
    kept_bytes(model)  # what is made once is made
    unpatched = kept_bytes(model)
    with npu_patch.applied(model, device=device, triton=False) as report:
        kept_bytes(model)
        assert kept_bytes(model) <= unpatched
        assert any(outcome.calls.ran for outcome in report.patched)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("triton", [False, True])
def test_frozen_heads_get_no_gradient_because_they_are_rotated_with_others(family: str, triton: bool) -> None:
    if triton and why_not() is not None:
        pytest.skip(why_not())
    model = get_peft_model(tiny(family), LoraConfig(r=4, target_modules=["q_proj"])).train().to("npu")
    wanted = []

    def look(
        module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *rest: object, **options: object
    ) -> object:
        wanted.append((query.requires_grad, key.requires_grad))
        return sdpa_attention_forward(module, query, key, *rest, **options)

    ALL_ATTENTION_FUNCTIONS.register("looks", look)
    model.config._attn_implementation = "looks"
    with npu_patch.applied(model, triton=triton) as report:
        model(**{name: each.to("npu") for name, each in tiny_batch().items()}).loss.backward()
        assert any(each.calls.ran for each in report.patched if each.patch in ("rope", "qk_norm_rope"))
    assert wanted == [(True, False), (True, True)]  # the second layer's k comes of the first one's adapters
