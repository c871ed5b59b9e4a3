"""Models with experts in int8: who computes them, in which order of `apply()` and loading, and what trains on them."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor

import npu_patch
from npu_patch.checkpoints.safetensors_file import BadCheckpoint
from npu_patch.ops.w8a8.experts import REGISTERED
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.reporting.outcome import Outcome
from tests.support.w8a8_models import IDS, WITH_EXPERTS, apart, loaded, logits, quantised

PATCH = "w8a8_experts"


def outcome() -> Outcome:
    (found,) = [each for each in npu_patch.report().outcomes if each.patch == PATCH]
    return found


def experts_in(model: Any) -> list[Any]:
    return [each for each in model.modules() if hasattr(each, "gate_up_proj_scale")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return quantised("qwen3_moe", tmp_path)


@pytest.fixture
def model(folder: Path, npu: torch.device) -> Any:
    npu_patch.apply()
    model = loaded(folder).to(npu)
    npu_patch.restore()
    return model


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_operators_compute_the_experts_of_a_loaded_model(model_type: str, tmp_path: Path, npu: torch.device) -> None:
    folder = quantised(model_type, tmp_path)
    npu_patch.apply()
    model = loaded(folder)
    expected = logits(model)
    assert outcome().calls.fell_through == {"input on cpu": 2}
    assert apart(logits(model.to(npu)), expected) < 0.02
    assert outcome().calls.ran == 2
    assert model.generate(IDS.to(npu), max_new_tokens=3, do_sample=False).shape == (2, 27)


def in_int32(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    step = rows.abs().amax(-1, keepdim=True) / 127
    return ((rows / step).round().int() @ weight.int().T).float() * scale.flatten() * step


def by_hand(model: Any) -> Any:
    """Its layers in int8 and its experts, one after the other, in sums of int32."""

    def linear(self: Any, x: Tensor) -> Tensor:
        return in_int32(x.flatten(0, -2), self.weight, self.weight_scale).view(*x.shape[:-1], -1)

    def experts(self: Any, tokens: Tensor, indices: Tensor, router_weights: Tensor) -> Tensor:
        y = torch.zeros_like(tokens)
        for expert in range(len(self.down_proj)):
            gate, up = in_int32(tokens, self.gate_up_proj[expert], self.gate_up_proj_scale[expert]).chunk(2, -1)
            rows = in_int32(gate * gate.sigmoid() * up, self.down_proj[expert], self.down_proj_scale[expert])
            y += rows * (router_weights * (indices == expert)).sum(-1, keepdim=True)
        return y

    for layer in model.modules():
        if isinstance(layer, W8A8Linear):
            layer.forward = MethodType(linear, layer)
        elif hasattr(layer, "gate_up_proj_scale"):
            layer.forward = MethodType(experts, layer)
    return model


@pytest.mark.parametrize("model_type", WITH_EXPERTS)
def test_logits_are_those_of_a_plain_int32_reference(model_type: str, tmp_path: Path, npu: torch.device) -> None:
    folder = quantised(model_type, tmp_path)
    npu_patch.apply()
    model = loaded(folder, dtype=torch.float32)
    expected = logits(by_hand(loaded(folder, dtype=torch.float32)))
    # A row that falls on the other side of a half, after another order of sums, is a step apart.
    assert apart(logits(model), expected) < 1e-3
    assert apart(logits(model.to(npu)), expected) < 1e-3


@pytest.mark.parametrize("given", [True, False])
def test_apply_serves_what_was_loaded_before(given: bool, model: Any) -> None:
    expected = logits(model)
    report = npu_patch.apply(model if given else None)
    assert apart(logits(model), expected) < 0.02
    assert outcome().calls.ran == 2 and outcome().layers == (2 if given else None)
    assert not [each for each in report.outcomes if "its config asks for" in each.reason]
    npu_patch.apply(model)
    assert logits(model) is not None and outcome().calls.ran == 4
    npu_patch.restore()
    assert torch.equal(logits(model), expected)


def test_a_model_without_such_experts_has_no_line_of_them(npu: torch.device) -> None:
    from npu_patch.commands.subject.tiny_model import tiny_model

    report = npu_patch.apply(tiny_model("qwen3_moe").to(npu))
    assert PATCH not in {each.patch for each in report.outcomes}


def test_switched_off_neither_loading_nor_operators_are_ours(model: Any) -> None:
    from transformers import modeling_utils

    original = modeling_utils.get_hf_quantizer
    expected = logits(model)
    report = npu_patch.apply(w8a8=False)
    assert modeling_utils.get_hf_quantizer is original
    assert not {each.patch for each in report.outcomes} & {PATCH, "w8a8_loading"}
    assert apart(logits(model), expected) < 0.02


def test_generation_switches_no_model_with_int8_experts_away_from_them(folder: Path, npu: torch.device) -> None:
    """`generate` asks for batched_mm where it finds grouped_mm."""
    npu_patch.apply()
    model = loaded(folder, device_map="npu:0")
    assert model.config._experts_implementation == REGISTERED
    model.generate(IDS.to(npu), max_new_tokens=2, do_sample=False)
    assert model.config._experts_implementation == REGISTERED and outcome().calls.ran > 0


def test_layers_that_are_not_int8_are_transformers_grouped_ones(tmp_path: Path, npu: torch.device) -> None:
    folder = quantised("qwen3_moe", tmp_path, "--ignore", r".*layers\.0\.mlp\.experts")
    npu_patch.apply()
    model = loaded(folder).to(npu)
    assert len(experts_in(model)) == 1
    assert apart(logits(model), logits(loaded(tmp_path / "original"))) < 0.05
    (floats,) = [each for each in npu_patch.report().outcomes if "'grouped_mm'" in each.site]
    assert floats.calls.ran == 1 and outcome().calls.ran == 1


def embedded(model: Any) -> Tensor:
    return model.get_input_embeddings()(IDS.to(model.device)).detach().requires_grad_()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_gradient_of_the_input_is_that_of_plain_torch(checkpointed: bool, model: Any) -> None:
    def gradient() -> Tensor:
        embeddings = embedded(model)
        model(inputs_embeds=embeddings).logits.float().square().mean().backward()
        assert embeddings.grad is not None
        return embeddings.grad.double().cpu()

    model.train()
    expected = gradient()
    npu_patch.apply(model)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert apart(gradient(), expected) < 0.05
    assert outcome().calls.ran >= 2


@pytest.mark.parametrize("mode", ["trained", "no_grad", "inference_mode"])
def test_one_function_whoever_looks_on(mode: str, model: Any) -> None:
    npu_patch.apply(model)
    expected = model.train()(IDS.to(model.device)).logits
    assert expected.requires_grad
    with {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(mode, torch.enable_grad)():
        assert torch.equal(model.eval()(IDS.to(model.device)).logits, expected)


def test_a_compiled_model_computes_the_same(model: Any) -> None:
    npu_patch.apply(model)
    with torch.no_grad():
        expected = model(IDS.to(model.device)).logits
        assert torch.equal(torch.compile(model, backend="eager")(IDS.to(model.device)).logits, expected)


def test_steps_of_generation_are_captured(model: Any) -> None:
    """Nothing in them waits for the device."""
    npu_patch.apply(model)
    told = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(IDS.to(model.device), **told)
    assert torch.equal(model.generate(IDS.to(model.device), cache_implementation="static", **told), expected)
    captured = [each for each in npu_patch.report().outcomes if each.patch == "captured_decode"]
    assert sum(each.calls.ran for each in captured) > 0


def test_autocast_decides_the_dtype(folder: Path, npu: torch.device) -> None:
    npu_patch.apply()
    model = loaded(folder, dtype=torch.float32).to(npu)
    expected = logits(model)
    assert outcome().calls.fell_through == {"tokens in torch.float32": 2}
    with torch.autocast("npu", torch.bfloat16):
        assert apart(logits(model), expected) < 0.03
    assert outcome().calls.ran == 2


def test_adapters_around_the_experts_train(model: Any) -> None:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    npu_patch.apply(adapted)
    adapted.train()(IDS.to(model.device), labels=IDS.to(model.device)).loss.backward()
    trained = [each for name, each in adapted.named_parameters() if "lora_B" in name]
    assert trained and all(each.grad is not None and each.grad.abs().max() > 0 for each in trained)
    assert outcome().calls.ran == 2


def test_a_hook_on_the_activation_is_heard(model: Any) -> None:
    npu_patch.apply(model)
    heard: list[Tensor] = []
    layer = experts_in(model)[0]
    if not isinstance(layer.act_fn, torch.nn.Module):
        pytest.skip("the activation is a function")
    layer.act_fn.register_forward_hook(lambda *call: heard.append(call[-1]))
    logits(model)
    assert outcome().calls.ran == 1 and outcome().calls.fell_through.total() == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"has_bias": True}, "experts with biases"),
        ({"has_post_expert_norm": True}, "a norm after each expert"),
        ({"_is_expert_parallel": True}, "experts on several ranks"),
    ],
)
def test_experts_of_another_kind_are_refused_as_they_are_loaded(
    change: dict[str, Any], reason: str, folder: Path, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    from npu_patch.patches.w8a8 import experts

    npu_patch.apply()
    loaded(folder)
    made = Qwen3MoeExperts.__init__

    def made_otherwise(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        vars(self).update(change)

    monkeypatch.setattr(Qwen3MoeExperts, "__init__", made_otherwise)
    known = experts.READINGS.of
    monkeypatch.setattr(experts.READINGS, "of", lambda layer: changed(known(layer), change), raising=False)
    with pytest.raises(BadCheckpoint, match=f"Qwen3MoeExperts computes what int8 experts do not: {reason}"):
        loaded(folder)


def changed(reading: Any, change: dict[str, Any]) -> Any:
    from dataclasses import replace

    if not hasattr(reading, "convention"):
        from npu_patch.probe.experts import Convention, ExpertsReading

        reading = ExpertsReading(Convention(), "SwiGLU")
    own = {name: value for name, value in change.items() if name != "_is_expert_parallel"}
    return replace(reading, convention=replace(reading.convention, **own))


def test_memory_of_the_layers_is_half_of_bfloat16(tmp_path: Path, npu: torch.device) -> None:
    """At the widths of real layers: scales and norms are little beside them."""
    from npu_patch.commands import main
    from npu_patch.commands.subject.tiny_model import auto_class, tiny_config

    config = tiny_config("qwen3_moe", False)
    config.hidden_size, config.moe_intermediate_size, config.head_dim, config.num_hidden_layers = 512, 384, 64, 1
    original = auto_class(config).from_config(config).bfloat16()
    original.save_pretrained(tmp_path / "original")
    assert main(["quantize", str(tmp_path / "original"), str(tmp_path / "int8")]) == 0
    npu_patch.apply()
    model = loaded(tmp_path / "int8", device_map="npu:0")
    layers = [sum(each.nbytes for each in of.model.layers.parameters()) for of in (model, original)]
    assert layers[0] / layers[1] < 0.55
