"""Frozen weights in FRACTAL_NZ: the same results, the same Parameters, and plain ones for everybody but products."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor, nn

import npu_patch
from npu_patch.applying.dry_run import dry_run
from npu_patch.ops import weight_format
from npu_patch.patches.inference import weight_nz
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.simulator import fractal
from tests.support.lora_models import PRECISIONS, adapted_model
from tests.support.tiny_models import tiny, tiny_batch

ND, NZ = 2, 29
SIZES = {"qwen3": {"hidden_size": 48, "intermediate_size": 64}, "qwen3_moe": {"moe_intermediate_size": 48}}
FAMILIES = tuple(SIZES)


def frozen(family: str, npu: torch.device, **overrides: Any) -> Any:
    return tiny(family, **SIZES.get(family, {}), **overrides).bfloat16().to(npu).requires_grad_(False)


def adapted(npu: torch.device, precision: str = "bfloat16", dropout: float = 0.0) -> Any:
    return adapted_model("qwen3", dropout, PRECISIONS[precision], **SIZES["qwen3"]).to(npu)


def formats(model: nn.Module) -> dict[str, int]:
    return {name: int(torch_npu.get_npu_format(each)) for name, each in model.named_parameters()}


def laid_out(model: nn.Module) -> set[str]:
    return {name for name, each in formats(model).items() if each == NZ}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().cpu().clone() for name, each in model.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name].cpu(), other[name].cpu()) for name in one)


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=tiny_batch()["input_ids"].to(next(model.parameters()).device)).logits.detach().cpu()


def outcome(report: Report) -> Outcome:
    (found,) = [each for each in report.outcomes if each.patch == "weight_nz"]
    return found


@pytest.mark.parametrize("mode", ["plain", "no_grad", "inference_mode", "train", "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_are_bitwise_those_of_plain_weights(family: str, mode: str, npu: torch.device) -> None:
    model = frozen(family, npu).train(mode == "train")
    around: dict[str, Callable[[], Any]] = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("npu", torch.bfloat16),
    }
    with around.get(mode, torch.enable_grad)():
        with npu_patch.applied(model):
            expected = logits(model)
        before, parameters = values(model), list(model.parameters())
        report = npu_patch.apply(model, weight_nz=True)
        assert outcome(report).status == "prepared" and laid_out(model) and torch.equal(logits(model), expected)
        assert same(values(model), before) and all(map(lambda a, b: a is b, model.parameters(), parameters))
        assert len(laid_out(model)) == outcome(report).layers, "of the experts too"
        npu_patch.restore()
    assert not laid_out(model) and same(values(model), before)
    assert all(map(lambda a, b: a is b, model.parameters(), parameters))


def test_experts_that_a_function_of_ours_serves_are_cast(npu: torch.device) -> None:
    model = frozen("qwen3_moe", npu)
    npu_patch.apply(model, weight_nz=True)
    assert {name for name in laid_out(model) if "experts" in name} == {
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("gate_up_proj", "down_proj")
    }
    npu_patch.restore()
    report = npu_patch.apply(model, weight_nz=True, moe_patch=False)
    assert outcome(report).status == "prepared" and not {name for name in laid_out(model) if "experts" in name}


def test_experts_are_plain_again_before_their_original_slices_them(npu: torch.device) -> None:
    model = frozen("qwen3_moe", npu)
    with npu_patch.applied(model):
        expected = logits(model)
    npu_patch.apply(model, weight_nz=True)
    experts = model.model.layers[0].mlp.experts
    experts.act_fn.register_forward_hook(lambda *_: None)  # who listens to it, hears: the original runs
    assert torch.allclose(logits(model).float(), expected.float(), atol=0.05)
    assert not laid_out(experts) and laid_out(model.model.layers[1].mlp.experts)


def test_by_default_nothing_is_cast(npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    npu_patch.apply(model)
    assert not laid_out(model)


@pytest.mark.parametrize("given", ["disable", "enable"])
def test_the_setting_of_formats_is_as_before(given: str, npu: torch.device) -> None:
    torch_npu._C._npu_setOption({weight_format.ALLOWED: given})
    try:
        model = frozen("qwen3", npu)
        npu_patch.apply(model, weight_nz=True)
        assert laid_out(model) and torch_npu._C._npu_getOption(weight_format.ALLOWED) == given.encode()
        npu_patch.restore()
        assert not laid_out(model) and torch_npu._C._npu_getOption(weight_format.ALLOWED) == given.encode()
    finally:
        torch.npu.config.allow_internal_format = False


def test_operators_are_not_compiled_at_calls_while_weights_are_cast(npu: torch.device) -> None:
    torch.npu.set_compile_mode(jit_compile=True)
    try:
        npu_patch.apply(frozen("qwen3", npu))
        assert not torch.npu.is_jit_compile_false()
        npu_patch.apply(frozen("qwen3", npu), weight_nz=True)
        assert torch.npu.is_jit_compile_false()
        npu_patch.restore()
        assert not torch.npu.is_jit_compile_false()
    finally:
        torch.npu.set_compile_mode(jit_compile=False)


class Reads(nn.Module):
    """Its code reads the weight of a layer within."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.inner.weight.sum()


class Subclass(nn.Linear):
    pass


class Scaled(nn.Linear):
    pass


def linear(**arguments: Any) -> nn.Linear:
    return nn.Linear(32, 48, bias=False, **arguments).bfloat16().requires_grad_(False)


def tied() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    model[1].weight = model[0].weight
    return model


def of_one_storage() -> nn.Module:
    model = nn.Sequential(linear(), linear())
    both = torch.randn(2, 48, 32, device="npu:0").bfloat16()
    for layer, own in zip(model, both, strict=True):
        layer.weight = nn.Parameter(own, requires_grad=False)
    return model


def hooked() -> nn.Module:
    model = linear()
    model.register_forward_pre_hook(lambda *_: None)
    return model


def scaled() -> nn.Module:
    model = linear()
    model.weight_scale = nn.Parameter(torch.ones(48, 1), requires_grad=False)
    return model


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "trained": (lambda: linear().requires_grad_(True), "1 trained"),
    "tied": (tied, "2 shared"),
    "one storage": (of_one_storage, "2 shared"),
    "float32": (lambda: linear().float(), "1 in float32"),
    "widths": (lambda: nn.Linear(40, 24).bfloat16().requires_grad_(False), "of widths 24 and 40, no multiples of 16"),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(linear()), "of a ParametrizedLinear"),
    "old weight norm": (lambda: nn.utils.weight_norm(linear()), "with hooks"),
    "hooked": (hooked, "with hooks"),
    "subclass": (lambda: Subclass(32, 32).bfloat16().requires_grad_(False), "of a Subclass"),
    "quantised": (scaled, "in bfloat16"),
    "read": (lambda: Reads().bfloat16().requires_grad_(False), "read by the code of a layer around"),
    "no layers": (nn.ReLU, "it has no linear layers"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_alone_is_said(name: str, npu: torch.device) -> None:
    make, why = LEFT[name]
    model = make().to(npu)
    report = npu_patch.apply(model, weight_nz=True)
    assert outcome(report).status == "skipped" and why in outcome(report).reason
    assert not laid_out(model)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_elsewhere_are_left_alone(device: str) -> None:
    model = linear().to(device)
    assert f"1 on {device}" in outcome(npu_patch.apply(model, weight_nz=True)).reason


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_the_head_stay_plain(tied: bool, npu: torch.device) -> None:
    model = frozen("qwen3", npu, tie_word_embeddings=tied, vocab_size=112)
    report = npu_patch.apply(model, weight_nz=True)
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & laid_out(model)
    assert outcome(report).reason == "left as they are: 1 of output embeddings"


def test_a_device_whose_products_are_wrong_keeps_plain_weights(
    npu: torch.device, monkeypatch: pytest.MonkeyPatch, simulated: None
) -> None:
    blocks = fractal.blocks
    monkeypatch.setattr(fractal, "blocks", lambda given: blocks(given).roll(16))
    model = frozen("qwen3", npu)
    found = outcome(npu_patch.apply(model, weight_nz=True))
    assert found.status == "skipped" and found.reason == "aclnnMatmulWeightNz is wrong on this device in torch.bfloat16"
    assert not laid_out(model)


def test_a_cann_without_the_product_keeps_plain_weights(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_format, "LIBRARIES", ("libascendcl.so", "libnone.so"))
    found = outcome(npu_patch.apply(frozen("qwen3", npu), weight_nz=True))
    assert found.reason.startswith("this CANN has no aclnnMatmulWeightNz")


@pytest.mark.parametrize("world", [1, 2])
def test_of_several_ranks_it_is_the_wrapped_model(
    world: int, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
    why = weight_nz.why_not(frozen("qwen3", npu), "npu", {"moe_patch": True})
    assert (why is None) == (world == 1)


def step(model: Any, npu: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(5)
    batch = {name: each.to(npu) for name, each in tiny_batch().items()}
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    found = {name: each.grad.cpu() for name, each in model.named_parameters() if each.grad is not None}
    return found | {"loss": loss.detach().cpu()}


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("precision", [each for each in PRECISIONS if each.startswith("bfloat16")])
def test_adapters_on_cast_layers_train_with_the_same_gradients(
    precision: str, dropout: float, npu: torch.device
) -> None:
    model = adapted(npu, precision, dropout)
    with PRECISIONS[precision].around(npu):
        with npu_patch.applied(model):
            expected = step(model, npu)
        report = npu_patch.apply(model, weight_nz=True)
        found = step(model, npu)
    assert len(laid_out(model)) == 14 and same(found, expected) and len(found) > 28
    calls = [each.calls for each in report.patched if each.patch == "lora"]
    assert sum(each.ran for each in calls) and not any(each.fell_through for each in calls), "nobody listens to a layer"


@pytest.mark.parametrize("undone", [False, True])
def test_what_was_cast_within_inference_mode_trains(undone: bool, npu: torch.device) -> None:
    model = adapted(npu)
    with npu_patch.applied(model):
        expected = step(model, npu)
    with torch.inference_mode():
        npu_patch.apply(model, weight_nz=True)
        if undone:
            npu_patch.restore()
    npu_patch.apply(model)
    assert same(step(model, npu), expected) and bool(laid_out(model)) != undone


def test_checkpointed_layers_train_with_the_same_gradients(npu: torch.device) -> None:
    model = adapted(npu)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with npu_patch.applied(model):
        expected = step(model, npu)
    npu_patch.apply(model, weight_nz=True)
    assert same(step(model, npu), expected) and laid_out(model)


def copied(model: Any) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: Any) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_whole(model: Any) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("made", [copied, pickled, saved_whole])
def test_copies_are_plain(made: Callable[[Any], nn.Module], allowed: bool, npu: torch.device) -> None:
    """Whether or not the user allows internal formats, in which copies would lie too."""
    model = frozen("qwen3", npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    torch.npu.config.allow_internal_format = allowed
    try:
        other = made(model)
    finally:
        torch.npu.config.allow_internal_format = False
    assert not laid_out(other) and same(values(other), before) and same(values(model), before)
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("keep_vars", [False, True])
def test_a_state_dict_is_plain_and_shares_its_memory(keep_vars: bool, npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    state = model.state_dict(keep_vars=keep_vars)
    assert {int(torch_npu.get_npu_format(each)) for each in state.values()} == {ND}
    assert all(torch.equal(state[name].cpu(), each) for name, each in before.items())
    name = "model.layers.0.mlp.up_proj.weight"
    state[name].fill_(2.0)
    assert model.get_parameter(name).unique().tolist() == [2.0]
    stream = io.BytesIO()
    torch.save(state, stream)
    loaded = torch.load(io.BytesIO(stream.getvalue()), weights_only=True)
    assert {int(torch_npu.get_npu_format(each)) for each in loaded.values()} == {ND}


def test_what_is_saved_loads_as_the_model_was(npu: torch.device, tmp_path: Path) -> None:
    model = frozen("qwen3", npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    model.save_pretrained(tmp_path)
    other = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert same(values(other), before)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_state_dict_is_what_the_model_computes_with(assign: bool, npu: torch.device) -> None:
    model, other = frozen("qwen3", npu), frozen("qwen3", npu, seed=3)
    expected = logits(other)
    npu_patch.apply(model, weight_nz=True)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert bool(laid_out(model)) != assign
    assert torch.allclose(logits(model).float(), expected.float(), atol=0.05) and same(values(model), values(other))
    npu_patch.restore()
    assert same(values(model), values(other))


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_somebody_writes_stay_what_was_written(in_place: bool, npu: torch.device) -> None:
    """As who synchronises weights does, past every door."""
    model = frozen("qwen3", npu)
    npu_patch.apply(model, weight_nz=True)
    parameter, new = model.model.layers[0].mlp.up_proj.weight, torch.randn(64, 48).bfloat16()
    if in_place:
        parameter.data.copy_(new)
    else:
        parameter.data = new.to(npu)
    assert torch.equal(parameter.cpu(), new) and logits(model).isfinite().all()
    npu_patch.restore()
    assert torch.equal(parameter.cpu(), new) and not laid_out(model)


@pytest.mark.parametrize("move", [lambda each: each.to("npu:0"), lambda each: each.bfloat16(), nn.Module.npu])
def test_a_move_that_changes_nothing_leaves_weights_in_blocks(move: Callable[[Any], Any], npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    cast = laid_out(model)
    move(model)
    assert laid_out(model) == cast and same(values(model), before)
    npu_patch.restore()
    assert not laid_out(model) and same(values(model), before)


@pytest.mark.parametrize("to", ["cpu", torch.float32, torch.float16])
def test_a_moved_or_widened_model_is_plain(to: Any, npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    model.to(to)
    widened = {name: each.to(to) if isinstance(to, torch.dtype) else each for name, each in before.items()}
    assert same(values(model), widened)
    if model.device.type == "npu":
        assert not laid_out(model)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_merge_and_unmerge_as_without(safe: bool, npu: torch.device) -> None:
    model, reference = adapted(npu), adapted(npu)
    npu_patch.apply(model, weight_nz=True)
    for each in (model, reference):
        each.merge_adapter(safe_merge=safe)
    assert same(values(model), values(reference)) and not laid_out(model)
    for each in (model, reference):
        each.unmerge_adapter()
    assert same(values(model), values(reference))


def test_adapters_that_were_merged_before_unmerge_as_without(npu: torch.device) -> None:
    model, reference = adapted(npu), adapted(npu)
    for each in (model, reference):
        each.merge_adapter()
    npu_patch.apply(model, weight_nz=True)
    assert laid_out(model)
    for each in (model, reference):
        each.unmerge_adapter()
    assert same(values(model), values(reference))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_adapters_are_taken_off_as_without(how: str, npu: torch.device) -> None:
    model, reference = adapted(npu), adapted(npu)
    npu_patch.apply(model, weight_nz=True)
    model, reference = getattr(model, how)(), getattr(reference, how)()
    assert same(values(model), values(reference)) and bool(laid_out(model)) == (how == "unload")
    npu_patch.restore()
    assert same(values(model), values(reference)) and not laid_out(model)


def test_adapters_that_are_saved_leave_the_layers_right(npu: torch.device, tmp_path: Path) -> None:
    model = adapted(npu)
    before = values(model)
    npu_patch.apply(model, weight_nz=True)
    model.save_pretrained(tmp_path)
    assert same(values(model), before) and (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_is_trained_after_all_is_plain_before_the_step(fused: bool, npu: torch.device) -> None:
    model, reference = frozen("qwen3", npu), frozen("qwen3", npu)
    for each in (model, reference):
        with npu_patch.applied(each, weight_nz=each is model):
            trained = each.model.layers[0].mlp.up_proj
            trained.weight.requires_grad_(True)
            step(each, npu)
            torch.optim.AdamW([trained.weight], lr=0.1, foreach=fused).step()
            if each is model:
                assert not laid_out(trained) and laid_out(each.model.layers[1])
    assert same(values(model), values(reference))


def test_it_is_said_once_that_weights_are_plain_again(npu: torch.device, caplog: pytest.LogCaptureFixture) -> None:
    npu_patch.log.forget()
    model = frozen("qwen3", npu)
    npu_patch.apply(model, weight_nz=True)
    caplog.clear()
    model.state_dict()
    model.state_dict()
    (said,) = [each.getMessage() for each in caplog.records if each.name == "npu_patch"]
    assert said.startswith("weight_nz: _save_to_state_dict asked for a weight, which is plain again")
    npu_patch.restore()
    npu_patch.apply(model, weight_nz=True)
    assert laid_out(model)


def test_applied_twice_and_to_another_model_it_is_undone_once(npu: torch.device) -> None:
    model, other = frozen("qwen3", npu), frozen("qwen3", npu, seed=3)
    doors = {name: vars(nn.Linear).get(name) for name in (*weight_nz.OF_A_LAYER, weight_nz.MOVES)}
    before = values(model), values(other)
    first = npu_patch.apply(model, weight_nz=True)
    assert outcome(npu_patch.apply(model, weight_nz=True)) is outcome(first)
    with npu_patch.applied(other, weight_nz=True):
        assert laid_out(other) and laid_out(model)
    assert not laid_out(other) and laid_out(model)
    assert vars(nn.Linear).get("_apply") is not doors["_apply"], "the first model still needs it"
    npu_patch.restore()
    assert not laid_out(model) and same(values(model), before[0]) and same(values(other), before[1])
    assert {name: vars(nn.Linear).get(name) for name in (*weight_nz.OF_A_LAYER, weight_nz.MOVES)} == doors
    assert not weight_format.HELD and weight_nz.__name__ not in weight_nz.BEFORE_STEP


def test_a_model_that_nobody_holds_is_freed(npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    npu_patch.apply(model, weight_nz=True)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not weight_format.HELD
    npu_patch.restore()


def test_one_that_fails_leaves_every_weight_as_it_was(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lay_out = frozen("qwen3", npu), weight_format.lay_out
    before = values(model)

    def third_fails(layer: nn.Module, names: tuple[str, ...]) -> None:
        if len(weight_format.HELD) == 2:
            raise RuntimeError("no memory left")
        lay_out(layer, names)

    monkeypatch.setattr(weight_format, "lay_out", third_fails)
    report = npu_patch.apply(model, weight_nz=True)
    assert outcome(report).status == "failed" and not laid_out(model) and same(values(model), before)


def test_a_dry_run_casts_nothing(npu: torch.device) -> None:
    model = frozen("qwen3", npu)
    switches = npu_patch.switches.resolve({"weight_nz": True})
    assert outcome(dry_run([], model, registries=False, switches=switches)).status == "prepared"
    assert not laid_out(model)
