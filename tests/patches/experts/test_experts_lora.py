"""LoRA beside and on grouped experts: gradients, launches, and what is saved, loaded and merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import npu_patch
from npu_patch import simulator
from npu_patch.patches.experts import patch as experts_patch
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR
from tests.support.tiny_models import tiny, tiny_batch

pytestmark = pytest.mark.skipif(not experts_patch.registry(), reason="experts are packed since transformers 5")
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "shared experts": {"target_modules": r".*shared_expert\.(gate|up|down)_proj"},
    "expert parameters": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "one expert parameter": {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
}
PRODUCTS = {"attention": (2, 2), "shared experts": (2, 2), "expert parameters": (2, 4), "one expert parameter": (2, 3)}


def with_lora(targets: str, family: str = "qwen3_5_moe", **overrides: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(tiny(family, **overrides), LoraConfig(r=4, init_lora_weights=False, **TARGETS[targets]))


def ran(report: npu_patch.Report) -> int:
    outcomes = [outcome for outcome in report if outcome.patch == "experts"]
    assert not any(outcome.calls.fell_through for outcome in outcomes), report
    return sum(outcome.calls.ran for outcome in outcomes)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("targets", TARGETS)
def test_loss_and_every_gradient(targets: str, checkpointing: bool, npu: torch.device) -> None:
    model = with_lora(targets).to(npu).train()
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    batch = tiny_batch()
    own = loss_and_gradients(model, batch)
    with npu_patch.applied(model, fused_ops=False, fla=False) as report:
        found = loss_and_gradients(model, batch)
    assert ran(report) == (4 if checkpointing else 2)
    assert found.keys() == own.keys()
    for name in own:
        assert relative_error(found[name], own[name]) < 2e-6, name


@pytest.mark.parametrize("targets", TARGETS)
def test_frozen_experts_cost_no_weight_gradient(targets: str, npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    family = "qwen3_5_moe" if targets == "shared experts" else "qwen3_moe"
    model = with_lora(targets, family, num_hidden_layers=2).to(npu)
    ids = tiny_batch()["input_ids"].to(npu)
    with npu_patch.applied(model, fused_ops=False, fla=False):
        model(input_ids=ids)
        with simulator.count() as forward:
            loss = model(input_ids=ids).logits.square().mean()
        with simulator.count() as backward:
            loss.backward()
    layers = [forward.by_op["npu::npu_grouped_matmul"][0], backward.by_op["npu::npu_grouped_matmul"][0]]
    # Nothing before the first layer's experts needs a gradient where only its shared expert has an adapter.
    first = {"attention": 0, "shared experts": 2, "expert parameters": 1, "one expert parameter": 0}[targets]
    assert layers == [2 * PRODUCTS[targets][0], 2 * PRODUCTS[targets][1] - first]


def test_nothing_of_an_adapted_weight_is_kept(npu: torch.device) -> None:
    """After an optimizer step, and after weights are written over in place, the next forward sees it."""
    model = with_lora("expert parameters").to(npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with npu_patch.applied(model, fused_ops=False, fla=False) as report:
        for change in ("step", "write"):
            before = model(**batch).loss
            if change == "step":
                before.backward()
                optimizer.step()
            else:
                for name, parameter in model.named_parameters():
                    if "down_proj" in name and "lora" not in name:
                        parameter.data.copy_(parameter.data.flip(0))
            after = model(**batch).loss
            with npu_patch.applied(model):
                pass
            own = copy.deepcopy(model)
            for module in own.modules():
                if hasattr(getattr(module, "config", None), "_experts_implementation"):
                    module.config._experts_implementation = "eager"
            assert abs(after.item() - before.item()) > 1e-3
            assert relative_error(after.detach().cpu(), own(**batch).loss.detach().cpu()) < NEAR
    assert ran(report) == 8


def test_merge_save_and_load_keep_names_and_layouts(npu: torch.device, tmp_path: Path) -> None:
    model = with_lora("expert parameters", "qwen3_moe").to(npu)
    ids = tiny_batch()["input_ids"].to(npu)
    base_state = {name: tensor.shape for name, tensor in tiny("qwen3_moe").state_dict().items()}
    with npu_patch.applied(model, fused_ops=False, fla=False) as report:
        adapted = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(tiny("qwen3_moe"), tmp_path).to(npu)
        assert relative_error(loaded(input_ids=ids).logits.cpu().double(), adapted.cpu().double()) < NEAR
        merged = model.merge_and_unload()
        assert relative_error(merged(input_ids=ids).logits.cpu().double(), adapted.cpu().double()) < 1e-5
        assert type(merged.model.layers[0].mlp.experts).__name__ == "Qwen3MoeExperts"
    assert ran(report) == 6
    assert {name: tensor.shape for name, tensor in merged.state_dict().items()} == base_state


def test_a_token_at_a_time(npu: torch.device) -> None:
    """Generation switches the experts to batched_mm, which is served too, and generates the same."""
    model = tiny("qwen3_moe").to(npu)
    ids = tiny_batch()["input_ids"].to(npu)
    own = model.generate(ids, max_new_tokens=5, do_sample=False)
    with npu_patch.applied(model, fused_ops=False, fla=False) as report:
        found = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found, own)
    calls = {o.site: o.calls.ran for o in report if o.patch == "experts"}
    assert calls == {"ExpertsInterface['grouped_mm']": 2, "ExpertsInterface['batched_mm']": 8}


def test_router_logits_and_their_loss_are_untouched(npu: torch.device) -> None:
    model = tiny("qwen3_moe", output_router_logits=True).to(npu)
    batch = {name: tensor.to(npu) for name, tensor in tiny_batch().items()}
    own = model(**batch)
    with npu_patch.applied(model, fused_ops=False, fla=False):
        found = model(**batch)
    assert len(found.router_logits) == len(own.router_logits) == 2
    assert relative_error(found.aux_loss.detach().cpu(), own.aux_loss.detach().cpu()) < NEAR
