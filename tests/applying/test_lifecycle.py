"""apply, restore, applied, report: what they reach, what they leave alone, and that everything comes back."""

from __future__ import annotations

import copy
import gc
import importlib
import io
import pickle
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model, init_empty_weights
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch import log
from npu_patch.measuring import tuning
from npu_patch.patches import rms_norm as rms_norm_patch
from npu_patch.sites.sites import modules_of_model
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR, apart
from tests.support.tiny_models import tiny, tiny_batch, with_forwards_of_their_own


def ran(report: npu_patch.Report, patch: str) -> int:
    return sum(outcome.calls.ran for outcome in report.patched if outcome.patch == patch)


def snapshot(model: torch.nn.Module) -> dict[tuple[str, str], Any]:
    """Every object in the namespaces of the model's modeling files, classes and layers, and the import hooks."""
    found: dict[tuple[str, str], Any] = {("sys", "meta_path"): list(sys.meta_path)}
    for module in modules_of_model(model):
        for name, value in vars(module).items():
            found[module.__name__, name] = value
            if isinstance(value, type):
                found |= {(f"{module.__name__}.{name}", key): entry for key, entry in vars(value).items()}
    for path, layer in model.named_modules():
        found |= {(path, key): entry for key, entry in vars(layer).items()}
    return found


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe", "gemma3", "glm4_moe"])
def test_restore_leaves_every_object_identical(family: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    loss_and_gradients(model, tiny_batch())  # whatever is made at the first forward is made now
    model.zero_grad(set_to_none=True)
    before = snapshot(model)
    npu_patch.apply(model)
    npu_patch.apply()
    changed = [key for key, value in snapshot(model).items() if before.get(key) is not value]
    assert len(changed) >= 3
    model(input_ids=tiny_batch()["input_ids"].to(npu))
    npu_patch.restore()
    after = snapshot(model)
    assert after.keys() == before.keys()
    assert [key for key in before if after[key] is not before[key] and key[0] != "sys"] == []
    assert after["sys", "meta_path"] == before["sys", "meta_path"]
    assert not npu_patch.report().outcomes


def test_names_signatures_state_and_copies_do_not_change(npu: torch.device) -> None:
    import inspect

    model = tiny("qwen3").to(npu)
    module = sys.modules[type(model).__module__]
    before = (
        [type(layer) for layer in model.modules()],
        list(model.state_dict()),
        [id(parameter) for parameter in model.parameters()],
        inspect.signature(module.apply_rotary_pos_emb),
        inspect.signature(module.Qwen3RMSNorm.forward),
        module.Qwen3MLP.forward.__qualname__,
        repr(model),
    )
    npu_patch.apply(model)
    after = (
        [type(layer) for layer in model.modules()],
        list(model.state_dict()),
        [id(parameter) for parameter in model.parameters()],
        inspect.signature(module.apply_rotary_pos_emb),
        inspect.signature(module.Qwen3RMSNorm.forward),
        module.Qwen3MLP.forward.__qualname__,
        repr(model),
    )
    assert before == after
    batch = tiny_batch()
    expected = loss_and_gradients(model, batch)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert loss_and_gradients(twin, batch)["loss"] == expected["loss"]
    assert pickle.loads(pickle.dumps(module.apply_rotary_pos_emb)) is module.apply_rotary_pos_emb


def test_a_function_that_a_layer_keeps_is_pickled_with_it(npu: torch.device) -> None:
    """Though its class does not show that it does."""
    model = tiny("qwen3").to(npu)
    rope = sys.modules[type(model).__module__].apply_rotary_pos_emb
    attention = model.model.layers[0].self_attn
    attention.rotary_fn, attention._hidden_kernels = rope, {"rotary": rope}
    with npu_patch.applied(model):
        found = pickle.loads(pickle.dumps(attention))
        bound = sys.modules[type(model).__module__].apply_rotary_pos_emb
        assert found.rotary_fn is found._hidden_kernels["rotary"] is bound is not rope
    assert attention.rotary_fn is attention._hidden_kernels["rotary"] is rope


def test_apply_twice_is_apply_once(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    first = npu_patch.apply(model)
    forward = type(model.model.norm).forward
    second = npu_patch.apply(model)
    assert type(model.model.norm).forward is forward
    assert [outcome.site for outcome in second.patched] == [outcome.site for outcome in first.patched]
    npu_patch.restore()
    assert type(model.model.norm).forward is not forward


def test_a_second_model_of_another_family_is_served_too(npu: torch.device) -> None:
    first, second = tiny("qwen3").to(npu), tiny("gemma3").to(npu)
    one = npu_patch.apply(first)
    other = npu_patch.apply(second)
    for model in (first, second):
        loss_and_gradients(model, tiny_batch())
    assert ran(one, "rms_norm") and ran(other, "rms_norm")
    assert {outcome.site.split(".")[2] for outcome in npu_patch.report().patched if "models" in outcome.site} == {
        "qwen3",
        "gemma3",
    }


def test_applied_undoes_only_what_it_added(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    npu_patch.apply(model, rope=False)
    outer = type(model.model.norm).forward
    module = sys.modules[type(model).__module__]
    rope = module.apply_rotary_pos_emb
    with npu_patch.applied(model):
        assert module.apply_rotary_pos_emb is not rope
    assert module.apply_rotary_pos_emb is rope
    assert type(model.model.norm).forward is outer


def test_applied_restores_when_the_block_raises(npu: torch.device) -> None:
    model = tiny("qwen3")
    forward = type(model.model.norm).forward
    with pytest.raises(ZeroDivisionError), npu_patch.applied(model):
        raise ZeroDivisionError
    assert type(model.model.norm).forward is forward


@pytest.mark.parametrize("when", ["before", "after"])
def test_apply_before_and_after_get_peft_model(when: str, npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    torch.manual_seed(3)
    config = LoraConfig(
        r=4, target_modules=["gate_proj", "up_proj", "q_proj"], modules_to_save=["norm"], init_lora_weights=False
    )
    if when == "before":
        report = npu_patch.apply(model)
        model = get_peft_model(model, config)
    else:
        model = get_peft_model(model, config)
        report = npu_patch.apply(model)
    patched = loss_and_gradients(model, tiny_batch())
    assert ran(report, "rms_norm") and ran(report, "swiglu") and ran(report, "rope")
    npu_patch.restore()
    original = loss_and_gradients(model, tiny_batch())
    assert patched.keys() == original.keys()
    assert any("lora" in name for name in patched) and any("modules_to_save" in name for name in patched)
    assert apart(patched, original) == {}


@pytest.mark.parametrize("hooked", ["before apply", "after apply"])
def test_a_model_under_device_map_hooks_is_reached(hooked: str, npu: torch.device) -> None:
    model = tiny("qwen3")
    batch = tiny_batch()
    expected = loss_and_gradients(copy.deepcopy(model).to(npu), batch)
    device_map = {"model.embed_tokens": "npu:0", "model.layers": "npu:0", "model.norm": "npu:0", "": "npu:0"}
    if hooked == "after apply":
        report = npu_patch.apply(model)
    model = dispatch_model(model, device_map=device_map, force_hooks=True)
    for layer in model.modules():
        if not list(layer.children()):
            add_hook_to_module(layer, ModelHook(), append=True)
    if hooked == "before apply":
        report = npu_patch.apply(model)
    norms = [layer for layer in model.modules() if "RMSNorm" in type(layer).__name__]
    assert all("_old_forward" in vars(layer) for layer in norms)
    found = loss_and_gradients(model, batch)
    assert ran(report, "rms_norm") == len(norms)
    assert relative_error(found["loss"], expected["loss"]) < NEAR
    npu_patch.restore()
    assert relative_error(loss_and_gradients(model, batch)["loss"], expected["loss"]) < NEAR
    assert ran(report, "rms_norm") == len(norms)  # nothing of ours ran after restore()


def test_a_forward_bound_on_an_instance_is_reached_or_reported(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    norm, other = model.model.norm, model.model.layers[0].input_layernorm
    norm.forward = types.MethodType(type(norm).forward, norm)
    other.forward = lambda hidden_states: hidden_states
    bound = norm.forward
    report = npu_patch.apply(model)
    assert norm.forward.__func__ is type(norm).forward
    hidden = [outcome for outcome in report.skipped if "lambda" in outcome.reason]
    assert [outcome.layers for outcome in hidden] == [1]
    twin = copy.deepcopy(norm)
    with torch.no_grad():
        twin.weight.mul_(2)
    x = torch.randn(2, 3, 48, device=npu)
    torch.testing.assert_close(twin(x), 2 * norm(x))
    npu_patch.restore()
    assert vars(norm)["forward"] is bound


def test_checkpointing_still_recomputes_and_gradients_agree(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu).train()
    expected = loss_and_gradients(model, tiny_batch())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    report = npu_patch.apply(model)
    found = loss_and_gradients(model, tiny_batch())
    layers = len(model.model.layers)
    assert ran(report, "swiglu") == 2 * layers
    assert ran(report, "rms_norm") == 2 * 4 * layers + 1
    assert apart(found, expected) == {}


def test_no_forward_of_a_checkpointing_layer_is_assigned(npu: torch.device) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    class NormAsLayer(GradientCheckpointingLayer):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(6))
            self.eps = 1e-6

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x32 = x.float()
            return self.weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)

    forward = NormAsLayer.forward
    globals()["NormAsLayer"] = NormAsLayer
    NormAsLayer.__module__ = __name__
    try:
        report = npu_patch.apply(NormAsLayer())
    finally:
        del globals()["NormAsLayer"]
    assert NormAsLayer.forward is forward
    assert not [outcome for outcome in report.patched if "NormAsLayer" in outcome.site]


def test_a_cpu_copy_works_beside_the_patched_model(npu: torch.device) -> None:
    on_cpu = tiny("qwen3_5")
    model = copy.deepcopy(on_cpu).to(npu)
    expected = loss_and_gradients(on_cpu, tiny_batch())
    report = npu_patch.apply(model)
    beside = loss_and_gradients(on_cpu, tiny_batch())
    assert all(torch.equal(beside[name], expected[name]) for name in expected)
    reasons = {reason for outcome in report.patched for reason in outcome.calls.fell_through}
    assert "input on cpu" in reasons and all(reason.endswith("on cpu") for reason in reasons)
    assert relative_error(loss_and_gradients(model, tiny_batch())["loss"], expected["loss"]) < NEAR


def test_a_family_imported_later_is_patched_when_it_is_imported(npu: torch.device) -> None:
    name = "transformers.models.granite.modeling_granite"
    saved = sys.modules.pop(name, None)
    try:
        report = npu_patch.apply()
        module = importlib.import_module(name)
        sites = {outcome.site for outcome in report.patched if outcome.site.startswith(name)}
        assert sites == {
            f"{name}.GraniteRMSNorm.forward",
            f"{name}.GraniteMLP.forward",
            f"{name}.apply_rotary_pos_emb",
            f"{name}.GraniteForCausalLM.forward",
        }
        forward = module.GraniteRMSNorm.forward
        npu_patch.restore()
        assert module.GraniteRMSNorm.forward is forward.__wrapped__
    finally:
        if saved is not None:
            sys.modules[name] = saved


def test_one_site_that_raises_leaves_the_others_patched(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_5").to(npu)
    genuine = rms_norm_patch.read_rms_norm

    def breaks(cls: type, *args: Any, **kwargs: Any) -> Any:
        if cls.__name__ == "Qwen3_5RMSNorm":
            raise LookupError("broken on purpose")
        return genuine(cls, *args, **kwargs)

    monkeypatch.setattr(rms_norm_patch, "read_rms_norm", breaks)
    report = npu_patch.apply(model)
    assert [(outcome.site.rsplit(".", 2)[1], outcome.reason) for outcome in report.failed] == [
        ("Qwen3_5RMSNorm", "LookupError: broken on purpose")
    ]
    assert {outcome.patch for outcome in report.patched} >= {"rms_norm", "rope", "swiglu"}
    npu_patch.restore()
    module = sys.modules[type(model).__module__]
    before = (module.Qwen3_5MLP.forward, module.apply_rotary_pos_emb)
    with pytest.raises(npu_patch.PatchError, match=r"Qwen3_5RMSNorm\.forward: LookupError: broken on purpose"):
        npu_patch.apply(model, strict=True)
    assert (module.Qwen3_5MLP.forward, module.apply_rotary_pos_emb) == before
    assert not npu_patch.report().outcomes


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"device": "gpu"}, ValueError, r"device='gpu'.*npu, cuda, cpu"),
        ({"model": "qwen3"}, TypeError, "torch.nn.Module or nothing, not str"),
    ],
)
def test_wrong_arguments_name_themselves(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        npu_patch.apply(**arguments)


def test_without_the_device_nothing_is_rebound_and_the_report_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log.forget()
    model = tiny("qwen3")
    forward = type(model.model.norm).forward
    monkeypatch.setattr(torch.npu, "is_available", lambda: False)
    report = npu_patch.apply(model)
    assert type(model.model.norm).forward is forward
    said = "npu_patch on npu (simulated): nothing was rebound: no npu device (torch.npu.is_available() is False)"
    assert said.split(": ", 1)[1] in " ".join(str(report).split())
    (record,) = caplog.records
    assert record.levelname == "WARNING" and said.split(": ", 1)[1] in record.message
    with pytest.raises(npu_patch.PatchError, match=r"strict=True\): no npu device \(torch.npu.is_available"):
        npu_patch.apply(model, strict=True)


def test_switched_off_says_by_what(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    log.forget()
    caplog.set_level("INFO", "npu_patch")
    monkeypatch.setenv("TWINKLE_NPU_PATCH", "off")
    assert "nothing was rebound: switched off by TWINKLE_NPU_PATCH" in str(npu_patch.apply(tiny("qwen3")))
    (record,) = caplog.records
    assert record.levelname == "INFO" and record.message.endswith("switched off by TWINKLE_NPU_PATCH")
    monkeypatch.setenv("TWINKLE_NPU_PATCH", "on")
    assert "nothing was rebound: switched off by apply(patch=False)" in str(npu_patch.apply(patch=False))
    monkeypatch.setenv("TWINKLE_NPU_ROPE", "0")
    assert "rope: switched off by TWINKLE_NPU_ROPE" in str(npu_patch.apply(tiny("qwen3")))


@pytest.mark.parametrize(
    ("switch", "what"), [("rope", "rope: switched off by apply(rope=False), and "), ("patch", "apply(patch=False): ")]
)
def test_what_an_earlier_apply_rebound_stays_and_is_a_warning(switch: str, what: str, npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    first = npu_patch.apply(model)
    report = npu_patch.apply(model, **{switch: False})
    (warning,) = report.warnings
    assert f"{what}still in place from an earlier apply(); call restore() first" in warning
    loss_and_gradients(model, tiny_batch())
    assert ran(first, "rope")
    npu_patch.restore()
    assert not npu_patch.apply(model, **{switch: False}).warnings


def test_a_tuning_file_that_comes_too_late_is_a_warning(
    npu: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("qwen3")
    npu_patch.apply(model)
    tuning.write(tmp_path / "tuned.json", "npu", [])
    monkeypatch.setenv("TWINKLE_NPU_TUNE", str(tmp_path / "tuned.json"))
    (warning,) = npu_patch.apply(model).warnings
    assert "tuned.json now and was not set before" in warning and "call restore() first" in warning
    npu_patch.restore()
    report = npu_patch.apply(model)
    assert not report.warnings and "0 decisions; 0 calls had their shapes" in " ".join(str(report).split())


def test_after_restore_nothing_is_applied(npu: torch.device) -> None:
    npu_patch.apply(tiny("qwen3"))
    npu_patch.restore()
    assert str(npu_patch.report()) == "npu_patch: nothing is applied"


def test_another_device_needs_restore_first(npu: torch.device) -> None:
    model = tiny("qwen3")
    npu_patch.apply(model)
    with pytest.raises(npu_patch.PatchError, match="patches for 'npu' are in place; call restore"):
        npu_patch.apply(model, device="cpu")
    npu_patch.restore()
    expected = loss_and_gradients(model, tiny_batch())
    report = npu_patch.apply(model, device="cpu")
    found = loss_and_gradients(model, tiny_batch())
    assert ran(report, "rms_norm") and ran(report, "rope") and ran(report, "swiglu")
    assert report.patched[0].implementation == "torch.nn.functional.rms_norm"
    assert report.patched[0].declined == {
        "triton": "serves npu, cuda only",
        "torch_npu.npu_rms_norm": "serves npu only",
    }
    assert apart(found, expected) == {}


def test_sixty_layers_on_meta_take_under_a_second_and_no_random_number(npu: torch.device) -> None:
    with torch.device("meta"):
        model = tiny("qwen3", num_hidden_layers=60)
    states = torch.get_rng_state(), torch.npu.get_rng_state()
    allocated = torch.npu.memory_allocated()
    started = time.process_time()  # not the clock: the machine may be busy with something else
    report = npu_patch.apply(model)
    assert time.process_time() - started < 1.0
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(torch.npu.get_rng_state(), states[1])
    assert torch.npu.memory_allocated() <= allocated  # less, if an earlier test left garbage
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    assert {outcome.layers for outcome in report.patched if outcome.patch == "rms_norm"} == {4 * 60 + 1}


@pytest.mark.parametrize(
    "where", ["meta device", "init_empty_weights", "inference_mode", "autocast", "bfloat16 default"]
)
def test_apply_works_inside_other_contexts(where: str, npu: torch.device) -> None:
    contexts = {
        "meta device": lambda: torch.device("meta"),
        "init_empty_weights": lambda: init_empty_weights(include_buffers=True),
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "bfloat16 default": lambda: default_dtype(torch.bfloat16),
    }
    model = tiny("qwen3_5").to(npu)
    with contexts[where]():
        report = npu_patch.apply(model)
    assert {outcome.patch for outcome in report.patched} >= {"rms_norm", "rope", "swiglu"}
    assert not report.failed
    patched = loss_and_gradients(model, tiny_batch())
    npu_patch.restore()
    assert relative_error(patched["loss"], loss_and_gradients(model, tiny_batch())["loss"]) < NEAR


class default_dtype:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


def test_two_threads_apply_each_site_once(npu: torch.device) -> None:
    models = [tiny("qwen3").to(npu), tiny("qwen3").to(npu)]
    threads = [threading.Thread(target=npu_patch.apply, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not hasattr(type(models[0].model.norm).forward.__wrapped__, "__wrapped__")
    assert len({outcome.site for outcome in npu_patch.report().patched}) == len(npu_patch.report().patched)


def test_a_function_wrapped_into_a_module_is_unwrapped_and_kept(npu: torch.device) -> None:
    """As the kernels package does with `use_kernel_func_from_hub`: the name is bound to an nn.Module."""
    model = tiny("qwen3").to(npu)
    module = sys.modules[type(model).__module__]
    plain = module.apply_rotary_pos_emb

    def wrapped(function: Any) -> torch.nn.Module:
        class Func(torch.nn.Module):
            def forward(self, *args: Any, **kwargs: Any) -> Any:
                return function(*args, **kwargs)

        return Func()

    module.apply_rotary_pos_emb = wrapper = wrapped(plain)
    try:
        report = npu_patch.apply(model)
        loss_and_gradients(model, tiny_batch())
        assert ran(report, "rope") == 2
        npu_patch.restore()
        assert module.apply_rotary_pos_emb is wrapper
    finally:
        module.apply_rotary_pos_emb = plain


def test_a_model_with_nothing_known_is_no_error(npu: torch.device) -> None:
    report = npu_patch.apply(torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()))
    assert not [outcome for outcome in report if outcome.patch in ("rms_norm", "rope", "swiglu")]


def test_a_patched_model_can_be_freed(npu: torch.device) -> None:
    import weakref

    model = tiny("qwen3").to(npu)
    npu_patch.apply(model)
    gone = weakref.ref(model)
    loss_and_gradients(model, tiny_batch())
    del model
    gc.collect()
    assert gone() is None


def test_a_patch_that_serves_nothing_it_should_is_a_warning(npu: torch.device) -> None:
    """Not a patch that has nothing to serve: gemma3's feed-forward layers use GELU, and MoE models may have no dense
    ones."""
    warnings = npu_patch.apply(with_forwards_of_their_own(tiny("qwen3"))).warnings
    assert warnings == ["swiglu: nothing in Qwen3ForCausalLM is served; 1 sites were found"]
    for family in ("gemma3", "qwen3_moe"):
        report = npu_patch.apply(tiny(family))
        assert not report.warnings
        skipped = [each for each in report if each.patch == "swiglu" and each.layers and each.status != "patched"]
        assert [each.reason for each in skipped] == (
            ["the activation is GELUTanh, not SiLU"] if family == "gemma3" else []
        )
