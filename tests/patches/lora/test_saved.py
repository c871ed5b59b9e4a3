"""Adapters of every kind that were trained patched: saved, loaded, merged and unloaded, they are what they would be
unpatched. What is not served says why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import Tensor, nn

import npu_patch
from tests.support.gradients import relative_error
from tests.support.lora_models import a_step, fell_through, ran
from tests.support.tiny_models import tiny, tiny_batch

ALONE = {"fused_ops": False, "moe_patch": False, "fla": False, "loss": False}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """`config` of the adapters. `reason`: why peft's own forward runs, if none of them is served. `skipped`: why those
    of the parts that are no linear layers are left alone. `second`: another adapter, active beside the first."""

    config: dict[str, Any]
    reason: str | None = None
    skipped: tuple[str, ...] = ()
    family: str = "qwen3"
    second: bool = False
    model: dict[str, Any] | None = None

    def base(self) -> nn.Module:
        return tiny(self.family, **(self.model or {})).requires_grad_(False)

    def adapted(self) -> Any:
        torch.manual_seed(1)
        config = {"r": 4, "lora_alpha": 3, "lora_dropout": 0.1, "target_modules": ATTENTION, "init_lora_weights": False}
        model = get_peft_model(self.base(), LoraConfig(**{**config, **self.config}))
        if self.second:
            model.add_adapter("second", LoraConfig(**{**config, "r": 2}))
            model.base_model.set_adapter(["default", "second"])
        return model


NO_LINEAR = "an adapter of no linear layer"
KINDS = {
    "plain": Kind({}),
    "all linear layers": Kind({"target_modules": "all-linear"}),
    "rsLoRA": Kind({"use_rslora": True}),
    "tied": Kind({}, model={"tie_word_embeddings": True}),
    "trained biases": Kind({"bias": "lora_only"}, family="qwen2"),
    "modules_to_save": Kind({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "DoRA": Kind({"use_dora": True}, "a variant of LoRA"),
    "lora_bias": Kind({"lora_bias": True, "target_modules": ATTENTION[:3]}, "an adapter with a bias", family="qwen2"),
    "embeddings": Kind({"target_modules": ["q_proj", "embed_tokens"]}, skipped=(NO_LINEAR,)),
    "experts": Kind(
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "lora_dropout": 0.0},
        skipped=(NO_LINEAR,),
        family="qwen3_moe",
    ),
    "two at once": Kind({}, "several active adapters", second=True),
}


def trained(kind: Kind, folder: Path, npu: torch.device) -> tuple[State, Any]:
    """What is saved after a step, and the model."""
    model = kind.adapted().to(npu).train()
    gradients = a_step(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter -= 0.1 * gradients[name].to(npu)
    model.save_pretrained(folder)
    return {name: value.cpu().clone() for name, value in model.state_dict().items()}, model


def loaded(kind: Kind, folder: Path, npu: torch.device) -> Any:
    model = PeftModel.from_pretrained(kind.base(), folder)
    if kind.second:
        model.load_adapter(folder / "second", "second")
        model.base_model.set_adapter(["default", "second"])
    return model.to(npu).eval()


def logits(model: nn.Module, npu: torch.device) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch()["input_ids"].to(npu)).logits.clone()


def state(model: nn.Module) -> State:
    return {name: value.cpu() for name, value in model.state_dict().items()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("name", KINDS)
def test_adapters_trained_patched_are_those_of_peft_wherever_they_are_loaded(
    name: str, tmp_path: Path, npu: torch.device
) -> None:
    kind = KINDS[name]
    own, _ = trained(kind, tmp_path / "own", npu)
    with npu_patch.applied(kind.adapted(), **ALONE) as report:
        found, model = trained(kind, tmp_path / "patched", npu)
        linear = sum(isinstance(each, AdaptedLinear) for each in model.modules())
        assert ran(report) == (linear if kind.reason is None else 0)
        assert set(fell_through(report)) == ({kind.reason} if kind.reason else set())
        assert {each.reason for each in report.skipped if each.patch == "lora"} == set(kind.skipped)
        assert not [each for each in report.warnings if "lora" in each]
        into_patched = loaded(kind, tmp_path / "patched", npu)
        patched_logits, patched_state = logits(into_patched, npu), state(into_patched)
        trained_logits = logits(model.eval(), npu)
    into_unpatched = loaded(kind, tmp_path / "patched", npu)
    assert found.keys() == own.keys()
    assert all(relative_error(found[each], own[each]) < 3e-6 for each in own)
    assert same(patched_state, found) and same(state(into_unpatched), found)
    assert torch.equal(trained_logits, patched_logits)  # what was trained is what was loaded, to the bit
    assert torch.equal(logits(into_unpatched, npu), logits(model, npu))
    assert relative_error(patched_logits, logits(model, npu)) < 2e-6


MERGES: dict[str, Callable[[Any], nn.Module]] = {
    "merge_adapter": lambda model: _after(model, "merge_adapter"),
    "merged safely": lambda model: _after(model, "merge_adapter", safe_merge=True),
    "unmerge_adapter": lambda model: _after(_after(model, "merge_adapter"), "unmerge_adapter"),
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "unload": lambda model: model.unload(),
}


def _after(model: Any, what: str, **how: Any) -> Any:
    getattr(model, what)(**how)
    return model


@pytest.mark.parametrize("way", MERGES)
@pytest.mark.parametrize("name", KINDS)
def test_merged_and_unloaded_they_leave_the_weights_that_peft_leaves(
    name: str, way: str, tmp_path: Path, npu: torch.device
) -> None:
    kind = KINDS[name]
    trained(kind, tmp_path, npu)

    def walked() -> tuple[State, Tensor, Tensor]:
        model = loaded(kind, tmp_path, npu)
        before = logits(model, npu)
        after = MERGES[way](model)
        return state(after), before, logits(after, npu)

    own, _, own_after = walked()
    with npu_patch.applied(**ALONE):
        found, before, after = walked()
    assert same(found, own)
    assert relative_error(after, own_after) < 2e-6
    if way != "unload":
        assert relative_error(after, before) < 1e-5
    elif not {"modules_to_save", "bias"} & set(kind.config):  # which stay
        assert torch.equal(after, logits(kind.base().eval().to(npu), npu))
