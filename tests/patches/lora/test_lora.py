"""LoRA of peft's on a patched model: loss and gradients, modes of training, what falls through, and what is left."""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as AdaptedLinear
from torch import nn
from torch.nn.utils import parametrize

import npu_patch
from npu_patch import simulator
from tests.support.gradients import in_float64, loss_and_gradients, relative_error
from tests.support.lora_models import (
    HALF,
    PRECISIONS,
    a_step,
    adapted_layer,
    adapted_model,
    fell_through,
    in_precision,
    ran,
)
from tests.support.parity import why_unequal
from tests.support.tiny_models import tiny, tiny_batch
from tests.support.training_modes import MODES
from tests.training.test_parity import ALL_EXPERTS

FAMILIES = ("qwen3", "llama", "gemma3", "qwen3_moe")
DROPOUTS = (0.0, 0.05)
ALONE = {"fused_ops": False, "moe_patch": False, "fla": False}  # the patch by itself


@pytest.mark.parametrize("mode", ["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("dropout", DROPOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_in_float32(family: str, dropout: float, mode: str, npu: torch.device) -> None:
    """With peft's own masks, which a checkpoint's second run draws again."""
    model = adapted_model(family, dropout)
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    layers = sum(isinstance(each, AdaptedLinear) for each in model.modules())
    with MODES[mode](model) if mode != "plain" else contextlib.nullcontext():
        own = a_step(model)
        with npu_patch.applied(model, **ALONE) as report:
            found = a_step(model)
    assert not fell_through(report)
    assert ran(report) == layers * (1 if mode == "plain" else 2)
    assert not any(each.calls.declined for each in report if each.patch == "lora")
    if dropout:  # float64 would draw masks of its own
        assert found.keys() == own.keys()
        assert max(relative_error(found[name], own[name]) for name in own) < 3e-6
    else:
        assert why_unequal(on_cpu, tiny_batch(seed=3), own, found) is None


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_no_further_from_float64_than_the_original(family: str, name: str, npu: torch.device) -> None:
    """The geometric mean of the ratios of all gradients' errors, over several models."""
    precision = PRECISIONS[name]
    ratios = []
    for seed in range(8):
        model = adapted_model(family, 0.0, precision, seed, **ALL_EXPERTS.get(family, {}))
        exact = a_step(in_float64(model))
        model = model.to(npu)
        own = a_step(model, precision)
        with npu_patch.applied(model, **ALONE) as report:
            found = a_step(model, precision)
        assert not fell_through(report) and found.keys() == own.keys()
        for key in exact:
            errors = [relative_error(each[key], exact[key]) for each in (found, own)]
            ratios += [errors[0] / errors[1]] if errors[1] > 0 and exact[key].any() else []
    assert statistics.geometric_mean(ratios) < 1.1


@pytest.mark.parametrize("name", PRECISIONS)
@pytest.mark.parametrize("mode", ["non-reentrant", "reentrant"])
def test_a_checkpoint_computes_again_what_the_forward_computed(mode: str, name: str, npu: torch.device) -> None:
    """Bit by bit, masks included: so the gradients are those without a checkpoint."""
    precision = PRECISIONS[name]
    model = adapted_model("qwen3", 0.3, precision).to(npu)
    with npu_patch.applied(model):
        plain = a_step(model, precision)
        with MODES[mode](model):
            again = a_step(model, precision)
    # Reentrant checkpoints see the input of the model as one that needs a gradient, which changes no sum.
    assert plain.keys() == again.keys()
    assert all(torch.equal(plain[key], again[key]) for key in plain)


@pytest.mark.parametrize("mode", MODES)
def test_other_ways_to_train(mode: str, npu: torch.device) -> None:
    if mode == "selective":
        pytest.skip("its policy saves products by their number, and the fused layer has others")
    model = adapted_model("qwen3", 0.05).to(npu)
    with npu_patch.applied(model):
        plain = a_step(model)
        with MODES[mode](model):
            found = a_step(model)
    assert max(relative_error(found[key], plain[key]) for key in plain) < 1e-6


def dora(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", use_dora=True))


def with_bias(model: nn.Module) -> Any:
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_bias=True))


def plain(model: nn.Module, **config: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **{"init_lora_weights": False, **config}))


def two_active(model: nn.Module) -> Any:
    model = plain(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model


def merged(model: nn.Module) -> Any:
    model = plain(model)
    model.merge_adapter()
    return model


def disabled(model: nn.Module) -> Any:
    model = plain(model)
    model.base_model.disable_adapter_layers()
    return model


def layers(model: nn.Module) -> list[AdaptedLinear]:
    return [each for each in model.modules() if isinstance(each, AdaptedLinear)]


def part_replaced(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], Any]:
    def build(model: nn.Module) -> Any:
        model = plain(model)
        for layer in layers(model):
            if name == "base_layer":
                layer.base_layer = make(layer.base_layer)
            else:
                getattr(layer, name)["default"] = make(getattr(layer, name)["default"])
        return model

    return build


class Doubled(nn.Linear):
    """As a quantised layer: a linear one with a forward of its own."""

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = like.weight, like.bias
        self.in_features, self.out_features = like.in_features, like.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Twice(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def hooked(name: str) -> Callable[[nn.Module], Any]:
    def make(part: nn.Module) -> nn.Module:
        part.register_forward_hook(lambda module, given, result: result * 0.5)
        return part

    return part_replaced(name, make)


def parametrized(part: nn.Module) -> nn.Module:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 0.5

    parametrize.register_parametrization(part, "weight", Half())
    return part


def forward_of_its_own(part: nn.Module) -> nn.Module:
    own = part.forward
    part.forward = lambda x: own(x) * 0.5
    return part


NOT_SERVED: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "two active adapters": (two_active, "several active adapters"),
    "merged": (merged, "its adapter is merged"),
    "disabled": (disabled, "adapters are disabled"),
    "DoRA": (dora, "a variant of LoRA"),
    "lora_bias": (with_bias, "an adapter with a bias"),
    "quantised base": (part_replaced("base_layer", Doubled), "base_layer is a Doubled"),
    "other dropout": (part_replaced("lora_dropout", lambda part: Twice()), "lora_dropout is a Twice"),
    "dropout in place": (part_replaced("lora_dropout", lambda part: nn.Dropout(0.2, inplace=True)), "dropout in place"),
    "dropout of everything": (part_replaced("lora_dropout", lambda part: nn.Dropout(1.0)), "dropout of 1.0"),
    "hooks on the base": (hooked("base_layer"), "hooks on base_layer"),
    "hooks on lora_A": (hooked("lora_A"), "hooks on lora_A"),
    "hooks on lora_B": (hooked("lora_B"), "hooks on lora_B"),
    "hooks on dropout": (hooked("lora_dropout"), "hooks on lora_dropout"),
    "parametrized base": (part_replaced("base_layer", parametrized), "base_layer is parametrized"),
    "parametrized lora_A": (part_replaced("lora_A", parametrized), "lora_A is parametrized"),
    "a forward of its own": (part_replaced("lora_B", forward_of_its_own), "lora_B is a Linear with a forward"),
}


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_what_is_not_served_computes_what_it_did_and_says_why(kind: str, npu: torch.device) -> None:
    build, reason = NOT_SERVED[kind]
    model = build(tiny("qwen3")).to(npu).train()
    trained = kind not in ("disabled", "merged", "dropout in place")  # which peft cannot train either
    own = a_step(model) if trained else None
    ids = tiny_batch()["input_ids"].to(npu)
    logits = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
        report = npu_patch.apply(model, **ALONE)
    assert torch.equal(*logits)
    assert ran(report) == 0
    (found,) = fell_through(report)
    assert reason in found
    if own is not None:
        patched = a_step(model)
        assert all(torch.equal(own[name], patched[name]) for name in own)


SERVED: dict[str, Callable[[nn.Module], Any]] = {
    "rsLoRA": lambda model: plain(model, use_rslora=True),
    "dropout": lambda model: plain(model, lora_dropout=0.2),
    "trained biases": lambda model: plain(model, bias="all"),
    "modules_to_save": lambda model: plain(model, modules_to_save=["lm_head", "embed_tokens"]),
    "one of two adapters": lambda model: _set(two_active(model), "second"),
    "tied weights": lambda model: plain(tiny("qwen3", tie_word_embeddings=True)),
    "some layers": lambda model: get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"])),
}


def _set(model: Any, adapter: str) -> Any:
    model.set_adapter(adapter)
    return model


@pytest.mark.parametrize("kind", SERVED)
def test_what_is_served_gets_the_same_gradients(kind: str, npu: torch.device) -> None:
    family = "qwen2" if kind == "trained biases" else "qwen3"  # one with biases
    model = SERVED[kind](tiny(family)).to(npu).train()
    own = a_step(model)
    with npu_patch.applied(model, **ALONE) as report:
        found = a_step(model)
    assert ran(report) == len(layers(model)) and not fell_through(report)
    assert found.keys() == own.keys()
    assert max(relative_error(found[name], own[name]) for name in own) < 3e-6


def test_a_base_weight_that_is_trained_gets_its_gradient(npu: torch.device) -> None:
    model = plain(tiny("qwen3"), lora_dropout=0.2).to(npu).train().requires_grad_(True)
    own = a_step(model)
    with npu_patch.applied(model, **ALONE) as report:
        found = a_step(model)
    assert ran(report) == len(layers(model))
    assert "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight" in own
    assert found.keys() == own.keys()
    assert max(relative_error(found[name], own[name]) for name in own) < 3e-6


@pytest.mark.parametrize("name", ["linear", "dropout"])
def test_a_function_that_the_layer_looks_up_and_somebody_bound_anew_is_found(
    name: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As profilers count, and as DeepSpeed shards."""
    model = plain(tiny("qwen3"), lora_dropout=0.2).to(npu).train()
    genuine, heard = getattr(nn.functional, name), []

    def anew(*args: Any, **kwargs: Any) -> torch.Tensor:
        heard.append(name)
        return genuine(*args, **kwargs)

    with npu_patch.applied(model, **ALONE) as report:
        monkeypatch.setattr(nn.functional, name, anew)
        a_step(model)
        monkeypatch.undo()
    assert ran(report) == 0
    assert len(heard) >= len(layers(model))
    assert all(f"functional.{name} was bound anew" in reason for reason in fell_through(report))


def test_within_a_transform_of_torch_func(npu: torch.device) -> None:
    layer = adapted_layer().to(npu)
    x = torch.randn(3, 5, 48, device=npu)

    def norm(given: torch.Tensor) -> torch.Tensor:
        return layer(given).square().sum()

    own = torch.func.grad(norm)(x)
    with npu_patch.applied(**ALONE) as report:
        found = torch.func.grad(norm)(x)
    assert torch.equal(own, found)
    assert fell_through(report) == {"within a transform of torch.func": 1}


def test_examples_with_adapters_of_their_own(npu: torch.device) -> None:
    model = two_active(tiny("qwen3"))
    model.set_adapter("default")
    model = model.to(npu).eval()
    ids = tiny_batch()["input_ids"].to(npu)
    with torch.no_grad():
        own = model(input_ids=ids, adapter_names=["second", "__base__"]).logits
        with npu_patch.applied(model, **ALONE) as report:
            found = model(input_ids=ids, adapter_names=["second", "__base__"]).logits
    assert torch.equal(own, found)
    assert ran(report) == 0


def test_inside_disable_adapter_and_after_it(npu: torch.device) -> None:
    model = plain(tiny("qwen3")).to(npu).eval()
    ids = tiny_batch()["input_ids"].to(npu)

    def both() -> list[torch.Tensor]:
        with torch.no_grad():
            with model.disable_adapter():
                without = model(input_ids=ids).logits
            return [without, model(input_ids=ids).logits]

    own = both()
    with npu_patch.applied(model, **ALONE) as report:
        found = both()
    assert torch.equal(own[0], found[0]) and relative_error(found[1], own[1]) < 1e-6
    assert ran(report) == fell_through(report)["adapters are disabled"] == len(layers(model))


@pytest.mark.parametrize("when", ["before", "after"])
def test_apply_before_and_after_get_peft_model(when: str, npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    if when == "before":
        npu_patch.apply(model)
    model = plain(model, lora_dropout=0.1).train()
    report = npu_patch.apply(model)
    a_step(model)
    assert ran(report) == len(layers(model))


def test_restore_puts_back_what_was_there(npu: torch.device) -> None:
    forward = vars(AdaptedLinear)["forward"]
    model = plain(tiny("qwen3")).to(npu)
    names = list(model.state_dict())
    npu_patch.apply(model)
    assert vars(AdaptedLinear)["forward"] is not forward
    assert list(model.state_dict()) == names
    copy.deepcopy(model)
    npu_patch.restore()
    assert vars(AdaptedLinear)["forward"] is forward


def test_switched_off_it_leaves_peft_alone(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWINKLE_NPU_LORA", "0")
    forward = vars(AdaptedLinear)["forward"]
    report = npu_patch.apply(plain(tiny("qwen3")).to(npu))
    assert vars(AdaptedLinear)["forward"] is forward
    assert any("switched off by TWINKLE_NPU_LORA" in note for note in report.notes)


def test_a_model_without_adapters_is_told_nothing_of_them(npu: torch.device) -> None:
    report = npu_patch.apply(tiny("qwen3").to(npu))
    assert not [warning for warning in report.warnings if "lora" in warning]


def test_what_is_saved_loaded_merged_and_unloaded(npu: torch.device, tmp_path: Path) -> None:
    """The same files, and the same weights after each, as without the patch."""
    ids = tiny_batch()["input_ids"].to(npu)

    def walked(folder: Path) -> dict[str, Any]:
        model = plain(tiny("qwen3"), lora_dropout=0.1).to(npu).train()
        optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
        torch.manual_seed(2)
        model(**{key: value.to(npu) for key, value in tiny_batch().items()}).loss.backward()
        optimizer.step()
        model.save_pretrained(folder)
        trained = {key: value.cpu() for key, value in model.state_dict().items() if "lora" in key}
        loaded = PeftModel.from_pretrained(tiny("qwen3").to(npu), folder).eval()
        with torch.no_grad():
            logits = loaded(input_ids=ids).logits.cpu()
            loaded.merge_adapter()
            in_one = loaded(input_ids=ids).logits.cpu()
            loaded.unmerge_adapter()
            again = loaded(input_ids=ids).logits.cpu()
            unloaded = loaded.merge_and_unload()
            last = unloaded(input_ids=ids).logits.cpu()
        files = sorted(each.name for each in folder.iterdir())
        return trained | {"logits": logits, "merged": in_one, "again": again, "unloaded": last, "files": files}

    own = walked(tmp_path / "own")
    with npu_patch.applied(**ALONE) as report:
        found = walked(tmp_path / "patched")
    assert ran(report) > 0
    assert own.pop("files") == found.pop("files")
    assert own.keys() == found.keys()
    for key in own:
        assert relative_error(found[key], own[key]) < 2e-6, key


def test_a_cpu_copy_computes_beside_the_patched_model(npu: torch.device) -> None:
    model = plain(tiny("qwen3"))
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    report = npu_patch.apply(model, **ALONE)
    loss_and_gradients(on_cpu, tiny_batch())
    assert fell_through(report) == {"input on cpu": len(layers(model))}


def test_an_adapter_that_changes_between_calls_is_seen(npu: torch.device) -> None:
    """No copy of a weight outlives a call: not of what `.data` changed, nor of another scaling or rank."""
    layer = in_precision(adapted_layer(), PRECISIONS["bfloat16, float32 adapters"]).to(npu).eval()
    x = torch.randn(2, 5, 48, device=npu, dtype=torch.bfloat16)

    def changed() -> Iterator[None]:
        yield
        layer.lora_A["default"].weight.data.mul_(2)
        yield
        layer.base_layer.weight.data.mul_(2)
        yield
        layer.scale_layer(0.25)
        yield
        layer.lora_A["default"] = nn.Linear(48, 7, bias=False, device=npu)
        layer.lora_B["default"] = nn.Linear(7, 72, bias=False, device=npu)
        yield

    with npu_patch.applied() as report, torch.no_grad():
        for _ in changed():
            found = layer(x)
            own = AdaptedLinear.forward.__wrapped__(layer, x)
            assert relative_error(found, own) < 2e-2
    assert ran(report) == 5


class ChangesItsInput(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        x += 1
        return y


def test_an_input_that_is_changed_in_place_afterwards_is_kept_as_it_was(npu: torch.device) -> None:
    """peft keeps a copy of it, in the adapter's dtype or behind a dropout; so its caller may."""
    precision = PRECISIONS["bfloat16, float32 adapters"]
    model = ChangesItsInput(adapted_layer(0.2, precision)).to(npu)
    x = torch.randn(2, 5, 48, device=npu, dtype=torch.bfloat16)

    def step() -> torch.Tensor:
        torch.manual_seed(0)
        model.zero_grad()
        model(x.clone()).float().square().mean().backward()
        return model.layer.lora_A["default"].weight.grad.clone()

    own = step()
    with npu_patch.applied() as report:
        found = step()
        torch.manual_seed(0)
        with torch.no_grad():
            without = model(x.clone())
        torch.manual_seed(0)
        assert torch.equal(model(x.clone()), without)
    assert relative_error(found, own) < 2e-2
    assert ran(report) == 3
    assert any("changes it in place" in why for each in report for why in each.calls.declined.values())


def without_adapters(model: Any, step: Callable[[], Any]) -> Any:
    """A step that goes through every layer, and through no adapter."""
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, given, result: result.requires_grad_())
    with model.disable_adapter():
        result = step()
    hook.remove()
    return result


@pytest.mark.parametrize("dropout, most", [(0.05, 0.75), (0.0, 0.75)])
def test_launches_and_bytes_that_adapters_cost(dropout: float, most: float, npu: torch.device) -> None:
    """Beyond those of the same step without them."""
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    precision = PRECISIONS["bfloat16, float32 adapters, autocast"]
    model = adapted_model("qwen3", dropout, precision).to(npu)
    batch = {name: each.to(npu) for name, each in tiny_batch().items()}

    def step() -> simulator.Counted:
        model.zero_grad(set_to_none=True)
        with simulator.count() as counted, precision.around(npu):
            model(**batch).loss.backward()
        return counted

    with npu_patch.applied(model, lora=False):
        own, none = step(), without_adapters(model, step)
    with npu_patch.applied(model):
        found = step()
    assert found.launches - none.launches < most * (own.launches - none.launches)
    assert found.bytes - none.bytes < most * (own.bytes - none.bytes)
    assert found.host_copies == own.host_copies == 0


@pytest.mark.parametrize("name", ["bfloat16, float32 adapters", "bfloat16, float32 adapters, autocast"])
def test_what_adapters_keep_for_the_backward(name: str, npu: torch.device) -> None:
    """Bytes of storages that are no parameters, beyond those of the same step without adapters."""
    precision = PRECISIONS[name]
    model = adapted_model("qwen3", 0.05, precision).to(npu)
    ids = tiny_batch(length=64)["input_ids"].to(npu)
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}

    def kept() -> int:
        found: dict[int, torch.Tensor] = {}

        def pack(saved: torch.Tensor) -> torch.Tensor:
            if saved.untyped_storage().data_ptr() not in parameters:
                found[saved.untyped_storage().data_ptr()] = saved
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved), precision.around(npu):
            model(input_ids=ids)
        return sum(each.untyped_storage().nbytes() for each in found.values())

    with npu_patch.applied(model, lora=False):
        own, none = kept(), without_adapters(model, kept)
    with npu_patch.applied(model):
        found = kept()
    assert found - none < 0.4 * (own - none), (found, own, none)
