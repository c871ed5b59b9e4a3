"""Residual add with RMSNorm in one kernel: layers compute what they did, and what waits is seen by nobody."""

from __future__ import annotations

import copy
import importlib
import itertools
import sys
import types
from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import npu_patch
from npu_patch import simulator
from npu_patch.applying.dry_run import dry_run
from npu_patch.measuring.measure import why_wrong
from npu_patch.ops import add_rms_norm, rms_norm
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.serving.case import Alternative
from npu_patch.serving.implementation import choose
from npu_patch.switches import resolve
from npu_patch.waiting.heads import NORMS
from npu_patch.waiting.sums import Addition, Deferred, DeferredBranch, DeferredSum
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.own_layers import own_layer, own_modeling, run, same
from tests.support.parity import NEAR, apart, assert_no_further_from_float64, why_unequal
from tests.support.tiny_models import tiny, tiny_batch

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("two_cores")
FAMILIES = ("qwen3", "llama", "qwen3_moe", "qwen3_5", "glm4_moe")
# Every expert gets tokens: one without has a gradient of zeros, or none.
ALL_EXPERTS = {"qwen3_moe": {"num_experts_per_tok": 5}, "glm4_moe": {"num_experts_per_tok": 6}}


def fused(report: Report) -> list[Outcome]:
    return [each for each in report.patched if each.patch == "add_rms_norm"]


def ran(report: Report) -> int:
    return sum(each.calls.ran for each in fused(report))


def fell_through(report: Report) -> dict[str, int]:
    return {reason: count for each in fused(report) for reason, count in each.calls.fell_through.items()}


def built(family: str, lora: bool = False, **overrides: object) -> nn.Module:
    model = tiny(family, **overrides)
    if lora:
        torch.manual_seed(1)
        targets = ["q_proj", "v_proj", "o_proj", "in_proj_qkv", "out_proj"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_in_float32(family: str, lora: bool, npu: torch.device) -> None:
    """To the bar of tests/training/test_parity.py."""
    model, batch = built(family, lora, **ALL_EXPERTS.get(family, {})), tiny_batch(length=5)
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert not report.failed
    assert ran(report) == 2, "once in each layer"
    assert not fell_through(report)
    assert why_unequal(on_cpu, batch, original, patched) is None


def test_bfloat16_is_no_further_from_float64_than_the_original(npu: torch.device) -> None:
    def check(report: Report, patched: bool) -> None:
        assert ran(report) == (4 if patched else 0)

    models = (
        (built(family, seed=seed, **ALL_EXPERTS.get(family, {})).bfloat16(), tiny_batch(length=9, seed=seed))
        for family, seed in itertools.product(FAMILIES, range(2))
    )
    assert_no_further_from_float64(models, npu, check, triton=True)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_gradient_checkpointing_still_recomputes(family: str, use_reentrant: bool, npu: torch.device) -> None:
    model = tiny(family).to(npu).train()
    layer = model.model.layers[0]
    forward, calls = vars(type(layer)).get("forward"), []
    expected = loss_and_gradients(model, tiny_batch(length=5))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    with npu_patch.applied(model, triton=True) as report:
        assert vars(type(layer)).get("forward") is forward and "forward" not in vars(layer)
        patched = loss_and_gradients(model, tiny_batch(length=5))
    assert len(calls) == 2, "forward, and again in the backward"
    assert ran(report) == 4
    assert not fell_through(report)
    assert why_unequal(model, tiny_batch(length=5), expected, patched) is None


@pytest.mark.parametrize("where", ["self_attn", "post_attention_layernorm"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_see_tensors(kind: str, where: str, npu: torch.device) -> None:
    """And the other layer, which has none, is served."""
    model = tiny("llama").to(npu)
    seen: list[object] = []
    hooked = getattr(model.model.layers[0], where)
    getattr(hooked, f"register_{kind}_hook")(lambda module, *given: seen.extend(given))
    expected = loss_and_gradients(model, tiny_batch(length=5))
    kinds = [type(each) for group in seen for each in (group if isinstance(group, tuple) else (group,))]
    seen.clear()
    with npu_patch.applied(model, triton=True) as report:
        found = loss_and_gradients(model, tiny_batch(length=5))
    assert [type(each) for group in seen for each in (group if isinstance(group, tuple) else (group,))] == kinds
    assert ran(report) == 1
    assert fell_through(report) == {"hooks on it" if where == "self_attn" else f"hooks on {where}": 1}
    assert apart(found, expected) == {}


def test_hooks_on_all_modules_see_tensors(npu: torch.device) -> None:
    model = tiny("llama").to(npu)
    seen: list[object] = []

    def see(module: nn.Module, given: tuple[object, ...], result: object) -> None:
        seen.extend([*given, *(result if isinstance(result, tuple) else (result,))])

    handle = nn.modules.module.register_module_forward_hook(see)
    try:
        with npu_patch.applied(model, triton=True) as report:
            logits(model)
    finally:
        handle.remove()
    assert seen and not any(isinstance(each, Deferred) for each in seen)
    assert fell_through(report) == {"hooks on all modules": 2}


def logits(model: nn.Module, length: int = 5) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch(length=length)["input_ids"].to(model.device)).logits.cpu()


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5"])
def test_hidden_states_and_attentions_are_the_same(family: str, npu: torch.device) -> None:
    model = tiny(family, attn_implementation="eager").to(npu)
    arguments = {"output_hidden_states": True, "output_attentions": True}
    ids = tiny_batch(length=5)["input_ids"].to(npu)
    expected = model(input_ids=ids, **arguments)
    for recorded_before in (True, False):
        model = model if recorded_before else tiny(family, attn_implementation="eager").to(npu)
        with npu_patch.applied(model, triton=True):
            found = model(input_ids=ids, **arguments)
        for name in ("hidden_states", "attentions"):
            assert len(found[name]) == len(expected[name]) > 0
            for one, other in zip(found[name], expected[name], strict=True):
                assert (one is None) == (other is None)
                if other is not None:
                    assert isinstance(one, Tensor)
                    assert relative_error(one.cpu(), other.cpu()) < 2e-6


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_generation_with_a_cache(family: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    ids = tiny_batch(length=4)["input_ids"].to(npu)
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **arguments)
    with npu_patch.applied(model, triton=True) as report:
        found = model.generate(ids, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(expected.logits)) < 2e-6
    assert ran(report) == 4 * 2
    assert not fell_through(report)


@pytest.mark.parametrize("when", ["before", "after"])
def test_copies_and_models_made_later_are_served(when: str, npu: torch.device) -> None:
    model = tiny("llama").to(npu)
    expected = logits(model)
    with npu_patch.applied(triton=True) as report:
        if when == "after":
            model = tiny("llama").to(npu)
        logits(model)
        copied = copy.deepcopy(model)
        del model
        assert relative_error(logits(copied), expected) < NEAR
        assert sum(each.calls.ran for each in fused(report) if "Llama" in each.site) == 4


def test_a_mixer_that_moved_is_known_by_its_new_layer(npu: torch.device) -> None:
    """Whose norm has a hook, and that of its old layer has none."""
    model = tiny("llama").to(npu)
    first, second = model.model.layers
    with npu_patch.applied(model, triton=True) as report:
        logits(model)
        first.self_attn, second.self_attn = second.self_attn, first.self_attn
        seen: list[object] = []
        first.post_attention_layernorm.register_forward_pre_hook(lambda norm, given: seen.extend(given))
        logits(model)
    assert [type(each) for each in seen] == [Tensor]
    assert ran(report) == 3


@pytest.mark.parametrize("apart", [False, True], ids=["at once", "first the norms"])
def test_two_patches_of_one_forward_are_restored_exactly(apart: bool, npu: torch.device) -> None:
    """Attention layers of Qwen3: QK-norm with RoPE, and the residual add, whichever came first."""
    model = tiny("qwen3").to(npu)
    cls = type(model.model.layers[0].self_attn)
    before, expected = vars(cls)["forward"], logits(model)
    if apart:
        with npu_patch.applied(model, triton=True, rope=False) as first:
            logits(model)
            inner = vars(cls)["forward"]
            with npu_patch.applied(model, triton=True) as second:
                assert vars(cls)["forward"] is not inner
                assert relative_error(logits(model), expected) < NEAR
                assert ran(second) == 4 and fused(second) == fused(first)
            assert vars(cls)["forward"] is inner
    else:
        second = npu_patch.apply(model, triton=True)
        forward = vars(cls)["forward"]
        again = npu_patch.apply(model, triton=True)
        assert vars(cls)["forward"] is forward
        assert fused(again) == fused(second)
        assert relative_error(logits(model), expected) < NEAR
        assert ran(second) == 2
        npu_patch.restore()
    (other,) = [each for each in second.patched if each.patch == "qk_norm_rope"]
    assert other.calls.ran == 2
    assert vars(cls)["forward"] is before
    assert torch.equal(logits(model), expected)


def test_a_family_imported_later_is_served(npu: torch.device) -> None:
    name = "transformers.models.mistral.modeling_mistral"
    packages = {each: sys.modules[each] for each in list(sys.modules) if each == name}
    model_class = None
    for each in packages:
        del sys.modules[each]
    try:
        with npu_patch.applied(triton=True) as report:
            module = importlib.import_module(name)
            model_class = module.MistralForCausalLM
            config = tiny("mistral").config
            model = model_class(config).to(npu).eval()
            logits(model)
        assert sum(each.calls.ran for each in fused(report) if each.site.startswith(name)) == 2
    finally:
        sys.modules.update(packages)


@pytest.mark.parametrize("off", ["triton", "rms_norm"])
def test_nothing_is_rebound_where_a_part_is_switched_off(off: str, npu: torch.device) -> None:
    model = tiny("llama").to(npu)
    forward = vars(type(model.model.layers[0].self_attn))["forward"]
    with npu_patch.applied(model, **{"triton": True, off: False}) as report:
        assert not fused(report)
        assert vars(type(model.model.layers[0].self_attn))["forward"] is forward


@pytest.mark.parametrize("family, mixers", [("llama", 1), ("qwen3_5", 2), ("gemma3", 0)])
def test_a_dry_run_finds_what_would_be_served(family: str, mixers: int) -> None:
    module = importlib.import_module(type(tiny(family)).__module__)
    report = dry_run([module], registries=False, switches=resolve({"triton": True}))
    found = [each for each in report if each.patch == "add_rms_norm"]
    assert [each.status for each in found] == ["patched"] * mixers
    assert not any(getattr(cls, "forward", None) in NORMS for cls in vars(module).values())


def no_eps(model: nn.Module) -> None:
    model.model.layers[0].post_attention_layernorm.variance_epsilon = 0.0


def own_forward_of_the_norm(model: nn.Module) -> None:
    norm = model.model.layers[0].post_attention_layernorm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def own_forward_of_the_mixer(model: nn.Module) -> None:
    mixer = model.model.layers[0].self_attn
    mixer.forward = lambda *args, **kwargs: type(mixer).forward(mixer, *args, **kwargs)


def a_weight_in_half_precision(model: nn.Module) -> None:
    model.model.layers[0].post_attention_layernorm.half()


def half_a_mixer(model: nn.Module) -> None:
    """Its result is of another dtype than the stream: the add promotes."""
    mixer = model.model.layers[0].self_attn
    mixer.o_proj.forward = lambda x: nn.functional.linear(x, mixer.o_proj.weight).half()


NORM = "post_attention_layernorm"


@pytest.mark.parametrize(
    "change, reason",
    [
        (no_eps, "eps 0.0: rows of zeros need a positive one"),
        (own_forward_of_the_norm, f"{NORM} is a LlamaRMSNorm with a forward of its own"),
        (own_forward_of_the_mixer, "it is a LlamaAttention with a forward of its own"),
        (a_weight_in_half_precision, "a weight of float16 beside float32"),
        (half_a_mixer, "the branch is used (add) before it is added"),
    ],
)
def test_what_is_not_known_falls_through(change: Callable[[nn.Module], None], reason: str, npu: torch.device) -> None:
    """And the other layer, which is as usual, does not."""
    model = tiny("llama").to(npu)
    change(model)
    expected = logits(model)
    with npu_patch.applied(model, triton=True) as report:
        assert relative_error(logits(model), expected) < NEAR
    assert fell_through(report) == {reason: 1}
    assert ran(report) == 1


def test_a_mixer_called_by_somebody_else_returns_tensors(npu: torch.device) -> None:
    model = tiny("llama").to(npu)
    layer = model.model.layers[0]
    hidden = torch.randn(2, 5, 48, device=npu)
    tables = model.model.rotary_emb(hidden, torch.arange(5, device=npu)[None])
    with npu_patch.applied(model, triton=True) as report:
        logits(model)
        y, _ = layer.self_attn(hidden, tables, attention_mask=None)
    assert type(y) is Tensor
    assert fell_through(report) == {"not called by the forward of its layer": 1}


def test_under_autocast_it_is_no_further_from_float64_than_the_original(npu: torch.device) -> None:
    """An add is no product: autocast casts nothing of it."""

    def check(report: Report, patched: bool) -> None:
        assert not patched or (ran(report) and not fell_through(report))

    models = (
        (built(family, seed=seed).bfloat16(), tiny_batch(length=9, seed=seed))
        for family, seed in itertools.product(("qwen3", "llama", "qwen3_5"), range(3))
    )
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert_no_further_from_float64(models, npu, check, triton=True)


def test_a_stream_in_float32_beside_half_precision_falls_through(npu: torch.device) -> None:
    """As autocast leaves it, where the model is in float32."""
    model = tiny("llama").to(npu)
    with torch.autocast("npu", dtype=torch.bfloat16):
        expected = logits(model)
        with npu_patch.applied(model, triton=True) as report:
            assert relative_error(logits(model).double(), expected.double()) < 2e-2
    assert ran(report) == 0 and sum(fell_through(report).values()) == 2


def test_a_model_on_the_cpu_falls_through(npu: torch.device) -> None:
    model = tiny("llama")
    expected = logits(model)
    with npu_patch.applied(model, triton=True) as report:
        assert torch.equal(logits(model), expected)
    assert fell_through(report) == {"its result is on cpu": 2}


@pytest.mark.parametrize("family", ["gemma3"])
def test_a_norm_before_the_add_is_not_reported(family: str, npu: torch.device) -> None:
    with npu_patch.applied(tiny(family).to(npu), triton=True) as report:
        assert not [each for each in report if each.patch == "add_rms_norm"]


def test_launches_of_a_step_drop(npu: torch.device, simulated: None) -> None:
    """Of each layer, an add forward and an addition of gradients backward; the two norms stay one launch each."""
    model, batch = tiny("llama").to(npu), tiny_batch(length=5)
    batch = {name: tensor.to(npu) for name, tensor in batch.items()}

    def step() -> simulator.Counted:
        model.zero_grad(set_to_none=True)
        with simulator.count() as counted:
            model(**batch).loss.backward()
        return counted

    with npu_patch.applied(model, triton=True):
        together = step()
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda *_: None)
        apart = step()
    assert apart.launches - together.launches == 2 * 2


NEXT = "return h + self.mlp(self.norm(h))"
IN_PLACE = {"in place": ("h = h.clone()", "h += y", NEXT)}
SERVED = {
    "usual": ("h = h + y", NEXT),
    "the branch first": ("h = y + h", NEXT),
    "the branch twice": ("h = h + y", NEXT + " + y"),
    "two norms": ("h = h + y", "return h + self.mlp(self.norm(h)) + self.mlp(self.other_norm(h))"),
    "a kind": ("if self.kind == 'other': y = y * 0.5", "h = h + y", NEXT),
    "a scale": ("if self.scale is not None: y = y * self.scale", "h = h + y", NEXT),
}
NOT_SERVED = {
    "multiplied": ("h = h + y * 0.5", NEXT),
    "added by torch": ("h = torch.add(h, y, alpha=2)", NEXT),
    "with dropout": ("h = h + nn.functional.dropout(y, 0.0, self.training)", NEXT),
    "the sum returned": ("return h + y",),
    "the sum returned too": ("h = h + y", "return h + self.mlp(self.norm(h)), h"),
    "the branch returned too": ("h = h + y", "return h + self.mlp(self.norm(h)), {'y': y}"),
    "the sum kept": ("h = h + y", "self.last = h", NEXT),
    "the sum given to a module": ("h = h + y", "return h + self.mlp(self.norm(h)) + self.mlp(h)"),
    "the branch given to a module": ("y = self.mlp(y)", "return h + y * self.norm(h)"),
    "returned early on a flag": ("h = h + y", "if self.early: return h", NEXT),
    "returned for a kind": ("h = h + y", "if self.kind == 'other': return h", NEXT),
}


@pytest.fixture
def modeling(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """A modeling file with one layer, whose forward ends as SERVED or NOT_SERVED say."""
    module = own_modeling({**SERVED, **NOT_SERVED, **IN_PLACE}[request.param])
    yield module
    del sys.modules[module.__name__]


@pytest.mark.parametrize("modeling", SERVED, indirect=True)
def test_a_layer_nobody_has_heard_of_is_served(modeling: types.ModuleType, npu: torch.device) -> None:
    layer, hidden = own_layer(modeling, npu)
    expected = run(layer, hidden)
    with npu_patch.applied(layer, triton=True) as report:
        found = run(layer, hidden)
    assert [each.site.rsplit(".", 2)[1] for each in fused(report)] == ["Mixer"]
    assert ran(report) == 1
    assert same(found, expected)


@pytest.mark.parametrize("modeling", NOT_SERVED, indirect=True)
def test_a_layer_that_does_something_else_is_left_alone(modeling: types.ModuleType, npu: torch.device) -> None:
    layer, hidden = own_layer(modeling, npu)
    forward = vars(modeling.Mixer)["forward"]
    expected = run(layer, hidden)
    with npu_patch.applied(layer, triton=True) as report:
        assert not fused(report)
        assert vars(modeling.Mixer)["forward"] is forward
        assert same(run(layer, hidden), expected)


@pytest.mark.parametrize("modeling", ["a scale"], indirect=True)
def test_a_flag_set_later_makes_the_branch_a_tensor(modeling: types.ModuleType, npu: torch.device) -> None:
    layer, hidden = own_layer(modeling, npu)
    with npu_patch.applied(layer, triton=True) as report:
        run(layer, hidden)
        layer.scale = 3.0
        found = run(layer, hidden)
    assert ran(report) == 1
    assert fell_through(report) == {"the branch is used (__mul__) before it is added": 1}
    assert same(found, run(layer, hidden))


@pytest.mark.parametrize("modeling", IN_PLACE, indirect=True)
def test_an_add_in_place_stays_one(modeling: types.ModuleType, npu: torch.device) -> None:
    layer, hidden = own_layer(modeling, npu)
    expected = run(layer, hidden)
    with npu_patch.applied(layer, triton=True) as report:
        found = run(layer, hidden)
    assert ran(report) == 0
    assert same(found, expected)


def waiting() -> tuple[DeferredSum, Tensor, list[str]]:
    x, residual, told = torch.arange(6.0).view(2, 3), torch.full((2, 3), 0.5), []
    total = residual + DeferredBranch(x, Addition(lambda *_: "never", told.append))
    assert isinstance(total, DeferredSum)
    return total, residual + x, told


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t * 2,
        lambda t: 2 * t,
        lambda t: t - t,
        lambda t: t + 1,
        lambda t: 1 + t,
        lambda t: -t,
        lambda t: t[0],
        lambda t: t @ t.T,
        lambda t: t == 1,
        lambda t: t > 1,
        lambda t: torch.cat([t, t]),
        lambda t: torch.nn.functional.softmax(t, dim=-1),
        lambda t: torch.zeros(2, 3) + t,
        lambda t: torch.zeros(2, 3).add_(t),
        lambda t: torch.stack(list(t)),
        lambda t: t.float().mean(),
        lambda t: torch.tensor(len(t)),
    ],
)
def test_whatever_is_done_with_a_sum_is_done_with_its_tensor(use: Callable[[object], Tensor]) -> None:
    total, tensor, told = waiting()
    assert torch.equal(use(total), use(tensor))
    assert len(told) == 1


def test_looking_at_a_sum_does_not_compute_it() -> None:
    total, tensor, told = waiting()
    assert (total.shape, total.dtype, total.device) == (tensor.shape, tensor.dtype, tensor.device)
    assert torch.equal(total.peek(), tensor)
    assert not told


@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_passes_its_self_check(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, npu: torch.device
) -> None:
    """The kernel, the two operators one after the other, and not a kernel that is off by a twentieth."""
    variant = {each.name: each for each in PLAIN_VARIANTS}["weightless" if weight_dtype is None else "float32 weight"]
    (kernel,) = add_rms_norm.ADD_RMS_NORM.implementations
    assert kernel.missing() is None
    original = Alternative(
        "apart", add_rms_norm.one_after_the_other(choose(rms_norm.RMS_NORM.implementations, "npu").chosen.run)
    )
    case = add_rms_norm.case(variant, 24, dtype, weight_dtype, original)

    def off(*call: object) -> tuple[Tensor, Tensor]:
        normed, total = kernel.run(*call)
        return 1.05 * normed, total

    assert why_wrong(case, original, npu) is None
    assert why_wrong(case, Alternative("kernel", kernel.run), npu) is None
    assert why_wrong(case, Alternative("off", off), npu) is not None
