"""Models that transformers loaded through compressed-tensors: they stay int8, compute in it, and are put back."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import npu_patch
from npu_patch import simulator
from npu_patch.applying.dry_run import dry_run
from npu_patch.commands import main
from npu_patch.commands.subject.tiny_model import tiny_model
from npu_patch.ops.w8a8.layer import W8A8Linear
from npu_patch.patches.w8a8 import compressed
from tests.support.gradients import loss_and_gradients

pytest.importorskip("compressed_tensors")

IDS = torch.randint(2, 100, (2, 24), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}
LAYERS, PRODUCT = 14, "npu::npu_quant_matmul"
FIRST = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("w8a8")
    tiny_model("qwen3").bfloat16().save_pretrained(path / "model")
    assert main(["quantize", str(path / "model"), str(path / "out")]) == 0
    return path / "out"


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture
def model(folder: Path, npu: torch.device) -> Any:
    return loaded(folder).to(npu)


def state(model: nn.Module) -> dict[str, Any]:
    """All that a preparation might touch."""
    found: dict[str, Any] = {}
    for name, layer in model.named_modules():
        own = {key: value for key, value in vars(layer).items() if key not in ("_parameters", "_forward_pre_hooks")}
        hooks, parameters = list(layer._forward_pre_hooks.items()), {k: id(v) for k, v in layer._parameters.items()}
        found[name] = type(layer), own, hooks, parameters
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS.to(next(model.parameters()).device), use_cache=False).logits.cpu()


def by_hand(folder: Path) -> Any:
    """The same weights in layers of int8 without a trace of compressed-tensors."""
    model = loaded(folder)
    model.ct_decompress_hook.remove()
    for name, linear in list(model.named_modules()):
        if "weight_scale" in linear._parameters:
            layer = W8A8Linear(linear.in_features, linear.out_features, dtype=torch.bfloat16)
            layer.load_state_dict(linear.state_dict())
            model.set_submodule(name, layer)
    return model


def prepared(report: Any) -> Any:
    (found,) = [each for each in report if each.patch == "w8a8" and "." in each.site and "Linear" not in each.site]
    return found


def test_such_a_model_stays_int8_computes_in_it_and_is_put_back(folder: Path, model: Any, npu: torch.device) -> None:
    before = state(model)
    reference = by_hand(folder).to(npu)
    with npu_patch.applied(reference, w8a8=False):
        expected = logits(reference)
    report = npu_patch.apply(model)
    assert (prepared(report).status, prepared(report).layers) == ("prepared", LAYERS)
    with simulator.count() as counted:
        assert torch.equal(logits(model), expected)
    assert counted.by_op[PRODUCT][0] == LAYERS
    layers = [layer for layer in model.modules() if isinstance(layer, W8A8Linear)]
    assert len(layers) == LAYERS and all(layer.weight.dtype == torch.int8 for layer in layers)
    npu_patch.restore()
    assert state(model) == before
    assert logits(model).isfinite().all() and model.get_submodule(FIRST).weight.dtype == torch.bfloat16


def test_switched_off_it_is_left_to_transformers(model: Any) -> None:
    report = npu_patch.apply(model, w8a8=False)
    assert not report.prepared and any(note.startswith("w8a8: switched off by") for note in report.notes)
    logits(model)
    assert model.get_submodule(FIRST).weight.dtype == torch.bfloat16


def test_a_dry_run_says_what_apply_does_and_changes_nothing(model: Any) -> None:
    before = state(model)
    modules = [__import__(type(model).__module__, fromlist=["_"])]
    dry = {(each.patch, each.site, each.status, each.layers) for each in dry_run(modules, model)}
    assert state(model) == before
    real = {(each.patch, each.site, each.status, each.layers) for each in npu_patch.apply(model)}
    of_w8a8 = {each for each in real if each[0] == "w8a8"}
    assert len(of_w8a8) == 2 and of_w8a8 <= dry


def test_applied_twice_it_is_prepared_once_and_put_back_once(model: Any) -> None:
    before = state(model)
    npu_patch.apply(model)
    with npu_patch.applied(model) as report:
        assert prepared(report).status == "prepared"
    assert type(model.get_submodule(FIRST)) is W8A8Linear
    npu_patch.restore()
    assert state(model) == before


def test_what_fails_on_the_way_leaves_the_model_as_it_was(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before, in_int8, done = state(model), compressed._in_int8, []

    def fails_at_the_third(layer: Any) -> Any:
        done.append(layer)
        if len(done) == 3:
            raise OSError("no memory left")
        return in_int8(layer)

    monkeypatch.setattr(compressed, "_in_int8", fails_at_the_third)
    report = npu_patch.apply(model)
    assert prepared(report).status == "failed" and "no memory left" in prepared(report).reason
    assert state(model) == before


@pytest.mark.parametrize("adapted_first", [False, True])
def test_every_adapter_on_top_has_a_gradient_where_it_had_none(model: Any, adapted_first: bool) -> None:
    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
        ).train()

    if adapted_first:
        wrapped = adapted()
        npu_patch.apply(wrapped)
    else:
        npu_patch.apply(model)
        wrapped = adapted()
    found = loss_and_gradients(wrapped, BATCH)
    assert len(found) == 1 + 8 and all(bool((each != 0).any()) for each in found.values())
    npu_patch.restore()
    assert len(loss_and_gradients(wrapped, BATCH)) == 1 + 4  # transformers' own path cuts them


def test_a_copy_that_is_saved_loads_again(model: Any, folder: Path, tmp_path: Path, npu: torch.device) -> None:
    npu_patch.apply(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    npu_patch.restore()
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path / "saved"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = loaded(tmp_path / "saved").to(npu)
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["quantization_config"]["quantization_status"] == "compressed"
    with npu_patch.applied(again):
        assert torch.equal(logits(again), expected)
    assert logits(again).isfinite().all()


def test_it_generates_and_is_copied_as_what_it_is(model: Any, npu: torch.device) -> None:
    npu_patch.apply(model)
    tokens = model.generate(IDS.to(npu), max_new_tokens=4, do_sample=False)
    copied = copy.deepcopy(model)
    assert torch.equal(copied.generate(IDS.to(npu), max_new_tokens=4, do_sample=False), tokens)
    assert copied.get_submodule(FIRST).weight.dtype == torch.int8


def test_a_model_that_nobody_holds_is_freed(folder: Path, npu: torch.device) -> None:
    model = loaded(folder).to(npu)
    npu_patch.apply(model)
    logits(model)
    gone = [weakref.ref(each) for each in (model, model.get_submodule(FIRST))]
    del model
    gc.collect()
    assert [each() for each in gone] == [None, None]


def test_hooks_before_and_after_the_trigger_keep_their_places(folder: Path, npu: torch.device) -> None:
    model = loaded(folder).to(npu)
    heard: list[str] = []
    model.register_forward_pre_hook(lambda *_: heard.append("first"), prepend=True)
    model.register_forward_pre_hook(lambda *_: heard.append("last"))
    before = state(model)
    with npu_patch.applied(model):
        logits(model)
    assert heard == ["first", "last"] and state(model) == before


def test_beneath_hooks_of_accelerate_it_is_the_forward_that_they_call(model: Any) -> None:
    layer = model.get_submodule(FIRST)
    add_hook_to_module(layer, ModelHook())
    before = state(model)
    with npu_patch.applied(model) as report, simulator.count() as counted:
        logits(model)
        assert prepared(report).layers == LAYERS
    assert counted.by_op[PRODUCT][0] == LAYERS and state(model) == before


def test_hooks_of_accelerate_that_came_later_stay(model: Any) -> None:
    layer = model.get_submodule(FIRST)
    before = vars(layer)["forward"]
    with npu_patch.applied(model):
        add_hook_to_module(layer, ModelHook())
        logits(model)
    remove_hook_from_module(layer)
    assert type(layer) is nn.Linear and layer.forward == before


def other_scheme(part: str, **changed: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        layer = model.get_submodule(FIRST)
        scheme = layer.quantization_scheme
        given = SimpleNamespace(**{**vars(getattr(scheme, part)), **changed})
        names = ("weights", "input_activations", "output_activations", "format")
        layer.quantization_scheme = SimpleNamespace(**{name: getattr(scheme, name) for name in names} | {part: given})

    return change


def with_zero_points(model: Any) -> None:
    layer = model.get_submodule(FIRST)
    layer.register_parameter("weight_zero_point", nn.Parameter(torch.zeros(len(layer.weight), 1), requires_grad=False))


def with_output(model: Any) -> None:
    layer = model.get_submodule(FIRST)
    layer.quantization_scheme = copy.deepcopy(layer.quantization_scheme)
    layer.quantization_scheme.output_activations = layer.quantization_scheme.input_activations


OTHERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "decompressed": (logits, "14 are decompressed already: apply() comes before the first forward"),
    "asymmetric weights": (other_scheme("weights", symmetric=False), "1 have another scheme: weights with symmetric F"),
    "groups": (other_scheme("weights", strategy="group"), "1 have another scheme: weights with strategy group"),
    "four bits": (other_scheme("weights", num_bits=4), "1 have another scheme: weights with num_bits 4"),
    "float8": (other_scheme("weights", type="float"), "1 have another scheme: weights with type float"),
    "static inputs": (other_scheme("input_activations", dynamic=False), "another scheme: inputs with dynamic False"),
    "inputs as one": (other_scheme("input_activations", strategy="tensor"), "inputs with strategy tensor"),
    "asymmetric inputs": (other_scheme("input_activations", symmetric=False), "inputs with symmetric False"),
    "outputs": (with_output, "1 have another scheme: outputs are quantised"),
    "zero points": (with_zero_points, "1 have weight_zero_point"),
    "elsewhere": (lambda model: model.get_submodule(FIRST).to("cpu"), "1 are on cpu"),
    "switched off": (lambda model: setattr(model.get_submodule(FIRST), "quantization_enabled", False), "switched off"),
    "other scales": (
        lambda model: setattr(model.get_submodule(FIRST).weight_scale, "data", torch.ones(1, device="npu")),
        "1 have other scales than one a row",
    ),
}


@pytest.mark.parametrize("which", OTHERS)
def test_another_scheme_is_left_to_transformers_with_the_reason(which: str, model: Any) -> None:
    change, reason = OTHERS[which]
    change(model)
    before = state(model)
    report = npu_patch.apply(model)
    found = prepared(report)
    assert found.status == "skipped" and reason in found.reason and "of its 14 quantised layers" in found.reason
    assert state(model) == before


def test_a_part_of_a_model_is_left_since_the_whole_is_decompressed(model: Any) -> None:
    before = state(model)
    report = npu_patch.apply(model.model)
    assert prepared(report).status == "skipped" and "apply() takes the whole model" in prepared(report).reason
    assert state(model) == before
