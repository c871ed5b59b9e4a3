"""QK-norm with RoPE in one kernel: attention layers compute what they did, and everything else is left to them."""

from __future__ import annotations

import copy
import importlib
import itertools
import re
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import npu_patch
from npu_patch.kernels.readiness import why_not
from npu_patch.measuring import measurer
from npu_patch.measuring.measure import why_wrong
from npu_patch.numerics import rotation
from npu_patch.ops import qk_norm_rope, rms_norm, rope
from npu_patch.ops.rms_norm import PLAIN_VARIANTS
from npu_patch.reporting.outcome import Outcome
from npu_patch.reporting.report import Report
from npu_patch.serving import implementation
from npu_patch.serving.case import Alternative, Case, Measured
from npu_patch.serving.implementation import choose
from npu_patch.waiting import heads as deferred_norm
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.own_layers import RMS_NORM
from tests.support.parity import NEAR, assert_no_further_from_float64, why_unequal
from tests.support.tiny_models import tiny, tiny_batch

if (reason := why_not()) is not None:
    pytest.skip(reason, allow_module_level=True)
pytestmark = pytest.mark.usefixtures("two_cores")
FAMILIES = ("qwen3", "qwen3_moe", "glm4_moe", "gemma3", "qwen3_next", "qwen3_5")
LAYERS = {"qwen3_next": 1, "qwen3_5": 1}  # with full attention, of 2
PARTS = ("rms_norm", "rope", "qk_norm_rope")
ALL_EXPERTS = {"qwen3_moe": {"num_experts_per_tok": 5}, "glm4_moe": {"num_experts_per_tok": 6}}
ALL_EXPERTS["qwen3_next"] = ALL_EXPERTS["qwen3_moe"]


def fused(report: Report) -> Outcome:
    (outcome,) = [each for each in report.patched if each.patch == "qk_norm_rope" and each.layers]
    return outcome


def built(family: str, lora: bool = False, **overrides: object) -> nn.Module:
    model = tiny(family, **overrides)
    if lora:
        torch.manual_seed(1)
        model = get_peft_model(
            model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "o_proj"], init_lora_weights=False)
        )
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_every_gradient_in_float32(family: str, lora: bool, npu: torch.device) -> None:
    model, batch = built(family, lora), tiny_batch(length=5)
    on_cpu = copy.deepcopy(model)
    model = model.to(npu)
    original = loss_and_gradients(model, batch)
    with npu_patch.applied(model, triton=True) as report:
        patched = loss_and_gradients(model, batch)
    assert not report.failed
    assert fused(report).calls.ran == LAYERS.get(family, 2)
    assert not fused(report).calls.fell_through
    assert why_unequal(on_cpu, batch, original, patched) is None


def test_bfloat16_is_no_further_from_float64_than_the_original(npu: torch.device) -> None:
    models = (
        (built(family, seed=seed, **ALL_EXPERTS.get(family, {})).bfloat16(), tiny_batch(length=9, seed=seed))
        for family, seed in itertools.product(FAMILIES, range(2))
    )
    assert_no_further_from_float64(models, npu, triton=True)


def layer_of(model: nn.Module) -> nn.Module:
    return model.model.layers[-1].self_attn


def logits(model: nn.Module, length: int = 5) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch(length=length)["input_ids"].to(model.device)).logits.cpu()


def test_each_call_is_counted_once_and_restored(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    cls = type(layer_of(model))
    before = vars(cls)["forward"], vars(importlib.import_module(cls.__module__))["apply_rotary_pos_emb"]
    with npu_patch.applied(model, triton=True) as report:
        logits(model)
        ran = {outcome.patch: outcome.calls.ran for outcome in report.patched if outcome.layers or outcome.calls.ran}
        assert not any(outcome.calls.fell_through for outcome in report.patched if outcome.patch in PARTS)
    assert ran["qk_norm_rope"] == 2
    assert ran["add_rms_norm"] == 2
    assert ran["rms_norm"] == 3, "one of each layer and the last one: the others are in the two kernels"
    assert "rope" not in ran or ran["rope"] == 0
    assert before == (vars(cls)["forward"], vars(importlib.import_module(cls.__module__))["apply_rotary_pos_emb"])
    assert deferred_norm.current() is None


@pytest.mark.parametrize("off", ["triton", "rms_norm", "rope"])
def test_nothing_is_rebound_where_a_part_is_switched_off(off: str, npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    with npu_patch.applied(model, **{"triton": True, off: False}) as report:
        assert not [outcome for outcome in report.patched if outcome.patch == "qk_norm_rope"]
        assert logits(model).isfinite().all()


def test_applied_to_what_the_other_patches_serve_already(npu: torch.device) -> None:
    model = tiny("qwen3").to(npu)
    expected = logits(model)
    with npu_patch.applied(model, triton=False), npu_patch.applied(model, triton=True) as report:
        assert relative_error(logits(model), expected) < NEAR
        assert fused(report).calls.ran == 2


def hook_on_q_norm(model: nn.Module) -> None:
    layer_of(model).q_norm.register_forward_hook(lambda module, given, y: y * 0.5)


def doubled_q_norm(model: nn.Module) -> None:
    norm = layer_of(model).q_norm
    norm.forward = lambda x: 2 * type(norm).forward(norm, x)


def another_norm(model: nn.Module) -> None:
    layer_of(model).k_norm = nn.RMSNorm(16, eps=0.1).to(model.device)


def no_eps(model: nn.Module) -> None:
    layer_of(model).q_norm.variance_epsilon = 0.0


def a_weight_in_half_precision(model: nn.Module) -> None:
    layer_of(model).q_norm.half()


@pytest.mark.parametrize(
    "change, reason",
    [
        (hook_on_q_norm, "hooks on q_norm"),
        (doubled_q_norm, "q_norm is a Qwen3RMSNorm with a forward of its own"),
        (another_norm, "k_norm is a RMSNorm, which is not served"),
        (no_eps, "an eps of 0"),
        (a_weight_in_half_precision, "weights of two dtypes"),
    ],
)
def test_what_is_not_known_falls_through(change: object, reason: str, npu: torch.device) -> None:
    """And the other layer, which is as usual, does not."""
    model = tiny("qwen3").to(npu)
    change(model)
    expected = logits(model)
    with npu_patch.applied(model, triton=True) as report:
        assert relative_error(logits(model), expected) < NEAR
        assert fused(report).calls.fell_through == {reason: 1}
        assert fused(report).calls.ran == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_it_is_no_further_from_float64_than_the_original(dtype: torch.dtype, npu: torch.device) -> None:
    """Norms and rotations are no products: autocast casts nothing of what they compute."""

    def check(report: Report, patched: bool) -> None:
        assert not patched or (fused(report).calls.ran and not fused(report).calls.fell_through)

    models = (
        (built(family, seed=seed).to(dtype), tiny_batch(length=9, seed=seed))
        for family, seed in itertools.product(("qwen3", "gemma3", "qwen3_5"), range(3))
    )
    with torch.autocast("npu", dtype=torch.bfloat16):
        assert_no_further_from_float64(models, npu, check, triton=True)


def test_a_model_on_the_cpu_falls_through(npu: torch.device) -> None:
    model = tiny("qwen3")
    expected = logits(model)
    with npu_patch.applied(model, triton=True) as report:
        assert torch.equal(logits(model), expected)
    assert fused(report).calls.fell_through == {"q_norm on cpu": 2}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, npu: torch.device) -> None:
    """Bit for bit what the patched model computes without: how near that is to the original, other tests tell."""
    model = tiny("qwen3").to(npu).train()
    with npu_patch.applied(model, triton=True) as report:
        expected = loss_and_gradients(model, tiny_batch(length=5))
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        before = fused(report).calls.ran
        found = loss_and_gradients(model, tiny_batch(length=5))
    assert fused(report).calls.ran - before == 4, "forward, and again in the backward"
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("family", ["qwen3", "gemma3", "qwen3_5"])
def test_generation_with_a_cache(family: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    ids = tiny_batch(length=4)["input_ids"].to(npu)
    arguments = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    expected = model.generate(ids, **arguments)
    with npu_patch.applied(model, triton=True) as report:
        found = model.generate(ids, **arguments)
    assert torch.equal(found.sequences, expected.sequences)
    assert relative_error(torch.stack(found.logits), torch.stack(expected.logits)) < 2e-6
    assert fused(report).calls.ran == 4 * LAYERS.get(family, 2)
    assert not fused(report).calls.fell_through


SOURCE = (
    RMS_NORM
    + """
def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)

def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

class Attention(nn.Module):
    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size)
        self.q_norm = RMSNorm(NORM_SIZE_Q)
        self.k_norm = RMSNorm(NORM_SIZE_K)
        self.scale = None

    def forward(self, hidden_states, position_embeddings):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k = self.q_proj(hidden_states), self.k_proj(hidden_states)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        cos, sin = position_embeddings
        BODY
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        y = torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        return self.o_proj(y.transpose(1, 2).flatten(-2))
"""
)
NORMS = "q, k = self.q_norm(q.view(shape)).transpose(1, 2), self.k_norm(k.view(shape)).transpose(1, 2)"
ROTATION = "q, k = apply_rotary_pos_emb(q, k, cos, sin)"
BODIES = {
    "usual": (NORMS, ROTATION),
    "heads first": (
        "q, k = q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2)",
        "q, k = self.q_norm(q), self.k_norm(k)",
        ROTATION,
    ),
    "norm after rotation": (
        "q, k = q.view(shape).transpose(1, 2), k.view(shape).transpose(1, 2)",
        ROTATION,
        "q, k = self.q_norm(q), self.k_norm(k)",
    ),
    "scaled between": (NORMS, "q = q * 0.9", ROTATION),
    "scaled by torch between": (NORMS, "q = torch.mul(q, 0.9)", ROTATION),
    "one of them": (NORMS, "q, _ = apply_rotary_pos_emb(q, q, cos, sin)"),
    "the norm looked at": (NORMS, "v = v * k.mean()", ROTATION),
    "over all heads": (
        "q, k = self.q_norm(q).view(shape).transpose(1, 2), self.k_norm(k).view(shape).transpose(1, 2)",
        ROTATION,
    ),
    "on a flag": (NORMS, "if self.scale: q = q * self.scale", ROTATION),
}


@pytest.fixture
def modeling(request: pytest.FixtureRequest) -> Iterator[types.ModuleType]:
    """A modeling file with one attention class, whose body is a value of BODIES."""
    module = types.ModuleType(f"own_{request.param.replace(' ', '_')}.modeling_own")
    sizes = ("6 * 8", "2 * 8") if request.param == "over all heads" else ("8", "8")
    source = SOURCE.replace("BODY", "\n        ".join(BODIES[request.param]))
    sys.modules[module.__name__] = module
    exec(source.replace("NORM_SIZE_Q", sizes[0]).replace("NORM_SIZE_K", sizes[1]), vars(module))
    yield module
    del sys.modules[module.__name__]


def own_layer(modeling: types.ModuleType, npu: torch.device) -> tuple[nn.Module, dict[str, Tensor]]:
    config = types.SimpleNamespace(hidden_size=12, num_attention_heads=6, num_key_value_heads=2, head_dim=8)
    torch.manual_seed(0)
    layer = modeling.Attention(config).to(npu)
    given = {"hidden_states": torch.randn(2, 3, 12), "cos": torch.randn(1, 3, 8), "sin": torch.randn(1, 3, 8)}
    given = {name: tensor.to(npu) for name, tensor in given.items()}
    return layer, {"hidden_states": given["hidden_states"], "position_embeddings": (given["cos"], given["sin"])}


@pytest.mark.parametrize("modeling", ["usual", "heads first"], indirect=True)
def test_a_class_nobody_has_heard_of_is_served(modeling: types.ModuleType, npu: torch.device) -> None:
    layer, given = own_layer(modeling, npu)
    expected = layer(**given)
    with npu_patch.applied(layer, triton=True) as report:
        found = layer(**given)
    assert fused(report).calls.ran == 1
    assert relative_error(found.cpu(), expected.cpu()) < NEAR


@pytest.mark.parametrize(
    "modeling, reason",
    [
        ("norm after rotation", r"is used \(repeat_interleave\)"),
        ("scaled between", "DeferredHeads"),
        ("scaled by torch between", "must be Tensor, not DeferredHeads"),
        ("one of them", r"is used \(repeat_interleave\)"),
        ("the norm looked at", r"is used \(mean\)"),
        ("over all heads", "its norms are not followed by a rotation|no two norms"),
    ],
    indirect=["modeling"],
)
def test_a_class_that_computes_something_else_is_left_alone(
    modeling: types.ModuleType, reason: str, npu: torch.device
) -> None:
    layer, given = own_layer(modeling, npu)
    expected = layer(**given)
    with npu_patch.applied(layer, triton=True) as report:
        found = layer(**given)
    (outcome,) = [each for each in report if each.patch == "qk_norm_rope"]
    assert outcome.status == "skipped"
    assert re.search(reason, outcome.reason), outcome.reason
    assert relative_error(found.cpu(), expected.cpu()) < NEAR


@pytest.mark.parametrize("modeling", ["on a flag"], indirect=True)
def test_a_flag_set_later_makes_the_call_run_anew(modeling: types.ModuleType, npu: torch.device) -> None:
    """The tiny layer that was observed had no scale; this one has, between norm and rotation."""
    layer, given = own_layer(modeling, npu)
    with npu_patch.applied(layer, triton=True) as report:
        layer(**given)
        assert fused(report).calls.ran == 1
        layer.scale = 3.0
        found = layer(**given)
        assert fused(report).calls.ran == 1
        assert sum(fused(report).calls.fell_through.values()) == 1
    assert relative_error(found.cpu(), layer(**given).cpu()) < NEAR


@pytest.mark.parametrize(
    ("family", "heads"),
    [("qwen3", "heads of 16"), ("glm4_moe", "heads of 16, 8 rotated"), ("qwen3_5", "heads of 16, 4 rotated")],
)
def test_heads_are_measured_as_they_are_rotated(
    family: str, heads: str, npu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And the calls of the model are those that were measured."""
    measured: list[Case] = []

    def times(case: Case, alternatives: Sequence[Alternative], *_: object) -> dict[str, Measured]:
        measured.append(case)
        return {each.name: Measured(seconds=1.0 if each.name == "triton" else 2.0) for each in alternatives}

    monkeypatch.setattr(implementation, "is_simulated", lambda *_: False)  # which has no times
    monkeypatch.setattr(measurer, "check", lambda *_: Measured())
    monkeypatch.setattr(measurer, "times", times)
    monkeypatch.setenv("TWINKLE_NPU_TRITON_CACHE", str(tmp_path / "times.json"))
    model = built(family).to(npu)
    with npu_patch.applied(model) as report:
        loss_and_gradients(model, tiny_batch(length=5))
        assert fused(report).calls.ran_by == {"triton": LAYERS.get(family, 2)}
    (name,) = {case.name for case in measured if case.op.name == "qk_norm_rope"}
    assert f"6 and 2 {heads} float32" in name


@pytest.mark.parametrize("rotary", [16, 6])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_measured_passes_its_self_check(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, rotary: int, npu: torch.device
) -> None:
    """The kernel and the two operators one after the other, and not a kernel that is off by a hundredth."""
    variant = {each.name: each for each in PLAIN_VARIANTS}["weightless" if weight_dtype is None else "float32 weight"]
    (kernel,) = qk_norm_rope.QK_NORM_ROPE.implementations
    assert kernel.missing() is None
    parts = (choose(each, "npu").chosen.run for each in (rms_norm.RMS_NORM.implementations, rope.ROPE.implementations))
    original = Alternative("apart", qk_norm_rope.one_after_the_other(*parts))
    halves = rope.RoPEVariant(rotation.HALF, rope.TABLES[0])
    case = qk_norm_rope.case(variant, halves, (3, 1), 16, rotary, dtype, weight_dtype, original)

    def off(*call: object) -> list[Tensor]:
        assert call[2].shape[-1] == rotary
        return [1.05 * each for each in kernel.run(*call)]

    assert why_wrong(case, original, npu) is None
    assert why_wrong(case, Alternative("kernel", kernel.run), npu) is None
    assert why_wrong(case, Alternative("off", off), npu) is not None
