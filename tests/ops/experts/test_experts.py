"""Experts on the NPU: every class of transformers, forward and every gradient, and what may not change it."""

from __future__ import annotations

import copy
import importlib
import re
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import npu_patch
from npu_patch import simulator
from npu_patch.ops.experts.grouped_matmul import torch_is_missing
from npu_patch.patches.experts import patch as experts_patch
from tests.support.experts_cases import (
    Routing,
    built,
    experts_classes,
    forgetting_modeling_files,
    outputs_and_gradients,
    routing,
)
from tests.support.gradients import relative_error
from tests.support.parity import NEAR, RATIO, apart, ratios

pytestmark = pytest.mark.skipif(not experts_patch.registry(), reason="transformers 4 has no experts registry")
CLASSES = experts_classes() if experts_patch.registry() else {}
# hidden, inner: all sides different; and a square gate_up, whose layout no shape tells.
SIDES = {"oblong": (24, 16), "square": (16, 8)}
EXPERTS, CHOICES, TOKENS = 5, 2, 13
# Skipped, with the reason in the report.
UNSERVED = {"dbrx.DbrxExperts"}
# Its own forward computes in float32 whatever it is given; what transformers runs by default does not.
EAGER_IN_FLOAT32 = {"openai_privacy_filter.OpenAIPrivacyFilterExperts"}


@pytest.fixture(scope="module", autouse=True)
def forgotten_afterwards() -> Iterator[None]:
    with forgetting_modeling_files():
        yield


def experts_class(name: str) -> type:
    return getattr(importlib.import_module(CLASSES[name]), name.split(".")[1])


def case(name: str, sides: str = "oblong", seed: int = 0, **arguments: Any) -> tuple[Any, Routing]:
    hidden, inner = SIDES[sides]
    module = built(experts_class(name), hidden=hidden, inner=inner, experts=EXPERTS, seed=seed, **arguments)
    return module, routing(tokens=TOKENS, hidden=hidden, experts=EXPERTS, choices=CHOICES, seed=seed)


def ran(report: npu_patch.Report) -> int:
    return sum(outcome.calls.ran for outcome in report if outcome.patch == "experts")


def fell_through(report: npu_patch.Report) -> dict[str, int]:
    return {key: value for o in report if o.patch == "experts" for key, value in o.calls.fell_through.items()}


def patched(module: Any, given: Routing, implementation: str = "grouped_mm") -> dict[str, torch.Tensor]:
    """What the patched module computes; it must have been the patch that did."""
    module = copy.deepcopy(module)
    if hasattr(module, "config"):
        module.config._experts_implementation = implementation
    with npu_patch.applied(module, fused_ops=False, fla=False) as report:
        found = outputs_and_gradients(module, given)
    assert ran(report) == 1, f"{fell_through(report)}\n{report}"
    assert not report.failed
    return found


def test_how_many_classes_there_are() -> None:
    assert len(CLASSES) - len(UNSERVED) >= 60, sorted(CLASSES)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("name", sorted(set(CLASSES) - UNSERVED))
def test_result_and_every_gradient_in_float32(name: str, sides: str, npu: torch.device) -> None:
    module, given = case(name, sides)
    own = outputs_and_gradients(module.to(npu), given)
    found = patched(module, given)
    assert found.keys() == own.keys()
    assert apart(found, own) == {}


@pytest.mark.parametrize("name", sorted(set(CLASSES) - UNSERVED))
def test_bfloat16_is_no_further_from_float64_than_the_original(name: str, npu: torch.device) -> None:
    """In the geometric mean of the result and all gradients of several layers."""
    found: list[float] = []
    for seed in range(4):
        module, given = case(name, seed=seed)
        module = module.bfloat16()
        given = Routing(given.tokens.bfloat16(), given.indices, given.router_weights.bfloat16())
        exact = outputs_and_gradients(copy.deepcopy(module).double(), given)
        module = module.to(npu)
        if name in EAGER_IN_FLOAT32:
            module.config._experts_implementation = "grouped_mm"
        own = outputs_and_gradients(module, given)
        found += ratios(patched(module, given), own, exact)
    assert statistics.geometric_mean(found) < RATIO


def test_float32_router_weights_of_bfloat16_tokens(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sigmoid routers give float32: the operator is given bfloat16, the gradient comes back in float32."""
    given_dtypes = set()
    genuine = torch.ops.npu.npu_moe_token_unpermute

    def watched(rows: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        given_dtypes.add((rows.dtype, weights.dtype))
        return genuine(rows, positions, weights)

    monkeypatch.setattr(torch.ops.npu, "npu_moe_token_unpermute", watched)
    module, given = case("deepseek_v3.DeepseekV3Experts")
    module = module.bfloat16().to(npu)
    module.config._experts_implementation = "grouped_mm"
    tokens, indices = given.tokens.bfloat16().to(npu), given.indices.to(npu)
    weights = given.router_weights.to(npu).requires_grad_(True)
    exact_weights = given.router_weights.double().requires_grad_(True)
    exact_module = copy.deepcopy(module).cpu().double()
    exact_module.config._experts_implementation = "eager"
    exact_module(tokens.cpu().double(), given.indices, exact_weights).square().sum().backward()
    with npu_patch.applied(module) as report:
        module(tokens, indices, weights).float().square().sum().backward()
    assert ran(report) == 1
    assert given_dtypes == {(torch.bfloat16, torch.bfloat16)}
    assert weights.grad.dtype == torch.float32
    assert relative_error(weights.grad.cpu().double(), exact_weights.grad) < 2e-2


ODD_ROUTINGS = {
    "one row": lambda: routing(tokens=1, hidden=24, experts=EXPERTS, choices=CHOICES),
    "top 1": lambda: routing(tokens=TOKENS, hidden=24, experts=EXPERTS, choices=1),
    "all experts": lambda: routing(tokens=TOKENS, hidden=24, experts=EXPERTS, choices=EXPERTS),
    "experts without tokens": lambda: _to_experts(routing(tokens=TOKENS, hidden=24, experts=2, choices=2), 3),
    "one expert takes all": lambda: _to_experts(routing(tokens=TOKENS, hidden=24, experts=1, choices=1), 4),
    "int32 indices": lambda: _as_int32(routing(tokens=TOKENS, hidden=24, experts=EXPERTS, choices=CHOICES)),
}


def _to_experts(given: Routing, first: int) -> Routing:
    return Routing(given.tokens, given.indices + first, given.router_weights)


def _as_int32(given: Routing) -> Routing:
    return Routing(given.tokens, given.indices.int(), given.router_weights)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("odd", ODD_ROUTINGS)
@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts"])
def test_odd_routings(name: str, odd: str, implementation: str, npu: torch.device) -> None:
    module, _ = case(name)
    given = ODD_ROUTINGS[odd]()
    own = outputs_and_gradients(module.to(npu), Routing(given.tokens, given.indices.long(), given.router_weights))
    found = patched(module, given, implementation)
    assert apart(found, own) == {}


def test_no_tokens(npu: torch.device) -> None:
    module, _ = case("qwen3_moe.Qwen3MoeExperts")
    module = module.to(npu)
    module.config._experts_implementation = "grouped_mm"
    empty = (
        torch.empty(0, 24, device=npu),
        torch.empty(0, 2, dtype=torch.long, device=npu),
        torch.empty(0, 2, device=npu),
    )
    with npu_patch.applied(module) as report:
        assert module(*empty).shape == (0, 24)
    assert fell_through(report) == {"no tokens": 1}


def test_a_registered_layer_without_weights_fails_as_the_original_does(npu: torch.device) -> None:
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module.config._experts_implementation = "grouped_mm"
    module.register_parameter("gate_up_proj", None)
    call = [each.to(npu) for each in (given.tokens, given.indices, given.router_weights)]
    with pytest.raises(AttributeError) as own:
        module.to(npu)(*call)
    with npu_patch.applied(module) as report, pytest.raises(AttributeError, match=re.escape(str(own.value))):
        module(*call)
    assert fell_through(report) == {"it has no experts": 1}


SENTINEL_CLASSES = ["qwen3_moe", "aria", "gpt_oss", "muse_spark", "nemotron_h", "minimax_m3_vl"]


@pytest.mark.parametrize("experts", [1, EXPERTS])
@pytest.mark.parametrize("flag", [True, None], ids=["declared", "older transformers"])
@pytest.mark.parametrize("name", [name for name in CLASSES if name.split(".")[0] in SENTINEL_CLASSES])
def test_indices_of_other_ranks(name: str, flag: bool | None, experts: int, npu: torch.device) -> None:
    """An index equal to the number of experts adds nothing and asks nothing, and nothing unwritten gets anywhere."""
    module = built(experts_class(name), hidden=24, inner=16, experts=experts).to(npu)
    given = routing(tokens=TOKENS, hidden=24, experts=experts + 3, choices=2)
    elsewhere = given.indices >= experts
    assert elsewhere.any() and elsewhere.all(1).any() and not elsewhere.all()
    weights = given.router_weights.masked_fill(elsewhere, 0.0)
    # The same in words that every class understands: expert 0 with weight 0.
    own = outputs_and_gradients(module, Routing(given.tokens, given.indices.masked_fill(elsewhere, 0), weights))
    own["router_weights"] = own["router_weights"].masked_fill(elsewhere, 0.0)
    if flag is None:
        del module._is_expert_parallel
    else:
        module._is_expert_parallel = flag
    found = patched(module, Routing(given.tokens, given.indices.clamp(max=experts), weights))
    assert apart(found, own) == {}


@pytest.mark.parametrize(
    "name", ["qwen3_moe.Qwen3MoeExperts", "gpt_oss.GptOssExperts", "longcat_flash.LongcatFlashExperts"]
)
def test_nothing_waits_for_the_device(name: str, npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("host copies are counted on the simulated NPU")
    module, given = case(name)
    module = module.to(npu)
    tokens, indices, weights = (each.to(npu) for each in (given.tokens, given.indices, given.router_weights))
    tokens.requires_grad_(True), weights.requires_grad_(True)
    if hasattr(module, "config"):
        module.config._experts_implementation = "grouped_mm"
        module._is_expert_parallel = True
    seed = torch.ones_like(tokens)
    with npu_patch.applied(module) as report:
        module(tokens, indices, weights)  # what is observed once
        with simulator.count() as counted:
            module(tokens, indices, weights).backward(seed)
    assert ran(report) == 2
    assert counted.by_op["npu::npu_grouped_matmul"][0] == 6
    assert counted.host_copies == 0, counted.host_copies_by_op


# What asks for a gradient -> grouped products in the backward, and tensors of the inputs' size kept for it.
NEEDS = {
    "tokens alone, as under LoRA": (("tokens", "router_weights"), 2),
    "parameters alone": (("gate_up_proj", "down_proj"), 3),
    "the first weight alone": (("gate_up_proj",), 2),
    "the last weight alone": (("down_proj",), 1),
    "everything": (("tokens", "router_weights", "gate_up_proj", "down_proj"), 4),
}


@pytest.mark.parametrize("needs", NEEDS)
def test_only_the_gradients_asked_for(needs: str, npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("launches are counted on the simulated NPU")
    names, products = NEEDS[needs]
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module = module.to(npu)
    module.config._experts_implementation = "grouped_mm"
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in names)
    tokens, indices, weights = (each.to(npu) for each in (given.tokens, given.indices, given.router_weights))
    tokens.requires_grad_("tokens" in names), weights.requires_grad_("router_weights" in names)
    kept: list[torch.Tensor] = []
    with npu_patch.applied(module):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
            result = module(tokens, indices, weights)
        with simulator.count() as counted:
            result.sum().backward()
    assert counted.by_op["npu::npu_grouped_matmul"][0] == products
    rows = TOKENS * CHOICES
    # The unpermute keeps its rows, [26, 24], for the router's gradient; swiglu its input, [26, 32].
    shapes = [tuple(tensor.shape) for tensor in {tensor.data_ptr(): tensor for tensor in kept}.values()]
    assert shapes.count((rows, 24)) == 1 + ("gate_up_proj" in names)
    assert shapes.count((rows, 16)) == ("down_proj" in names)
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == (name in names)
        assert parameter.grad is None or parameter.grad.is_contiguous()


def test_weights_go_in_as_views(npu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward copies a weight: what the operator sees is the parameter's own memory."""
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module = module.to(npu)
    own = {parameter.data_ptr() for parameter in module.parameters()}
    seen = []
    genuine = torch.ops.npu.npu_grouped_matmul

    def watched(x: list, weight: list, **arguments: Any) -> Any:
        if arguments["group_type"] == 0:
            seen.append(weight[0].data_ptr())
        return genuine(x, weight, **arguments)

    monkeypatch.setattr(torch.ops.npu, "npu_grouped_matmul", watched)
    module.config._experts_implementation = "grouped_mm"
    with npu_patch.applied(module):
        outputs_and_gradients(module, given)
    assert len(seen) == 4 and set(seen) == own


def test_eager_is_left_alone_and_said(npu: torch.device) -> None:
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module = module.to(npu)
    with npu_patch.applied(module) as report:
        outputs_and_gradients(module, given)
    assert ran(report) == 0
    assert [o.reason for o in report.skipped if o.patch == "experts"] == [
        "its config asks for the experts implementation 'eager'"
    ]
    assert any("experts" in warning for warning in report.warnings)


class ScaledExperts(torch.nn.Module):
    """Registered experts whose own forward does more than transformers' flags say."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.genuine = experts_class("qwen3_moe.Qwen3MoeExperts")
        self.num_experts, self.act_fn = config.num_experts, torch.nn.functional.silu
        self.gate_up_proj = torch.nn.Parameter(torch.randn(config.num_experts, 32, 24))
        self.down_proj = torch.nn.Parameter(torch.randn(config.num_experts, 24, 16))

    def forward(self, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
        return 2 * self.genuine.forward.__wrapped__(self, hidden_states, top_k_index, top_k_weights)


def test_a_class_that_computes_something_else_is_left_alone_and_said(npu: torch.device) -> None:
    from transformers.integrations.moe import use_experts_implementation

    cls = use_experts_implementation(ScaledExperts)
    module = built(cls, hidden=24, inner=16, experts=EXPERTS, implementation="grouped_mm").to(npu)
    _, given = case("qwen3_moe.Qwen3MoeExperts")
    with npu_patch.applied(module) as report:
        outputs_and_gradients(module, given)
    assert ran(report) == 0
    (outcome,) = [o for o in report.skipped if o.patch == "experts"]
    assert "not that of routed experts" in outcome.reason
    assert list(fell_through(report)) == [outcome.reason]


def test_a_clamp_is_seen_however_wide(npu: torch.device) -> None:
    """A gate that clamps at 900 is no SwiGLU, and is called itself."""
    module, given = case("deepseek_v4.DeepseekV4Experts")
    module.limit = 900.0
    given = Routing(given.tokens * 1e4, given.indices, given.router_weights)
    own = outputs_and_gradients(module.to(npu), given)
    found = patched(module, given)
    assert relative_error(found["result"], own["result"]) < NEAR


class Wrapped(torch.Tensor):
    """A tensor subclass, as DTensor is one."""


def test_tensor_subclasses_run_the_original(npu: torch.device) -> None:
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module = module.to(npu)
    module.config._experts_implementation = "batched_mm"
    tokens, indices, weights = (each.to(npu) for each in (given.tokens, given.indices, given.router_weights))
    own = module(tokens, indices, weights)
    with npu_patch.applied(module, fused_ops=False, fla=False) as report:
        found = module(tokens.as_subclass(Wrapped), indices, weights)
    assert fell_through(report) == {"tensor subclass": 1}
    assert torch.equal(found.as_subclass(torch.Tensor), own)


def test_cpu_tensors_run_the_original(npu: torch.device) -> None:
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module.config._experts_implementation = "batched_mm"
    own = outputs_and_gradients(module, given)
    with npu_patch.applied(module, fused_ops=False, fla=False) as report:
        found = outputs_and_gradients(module, given)
    assert fell_through(report) == {"input on cpu": 1}
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_a_torch_without_grouped_mm_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.9 and older."""
    monkeypatch.delattr(torch.nn.functional, "grouped_mm", raising=False)
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    own = outputs_and_gradients(module, given)
    with npu_patch.applied(module, device="cpu", fused_ops=False, fla=False) as report:
        found = outputs_and_gradients(module, given)
    assert ran(report) == 0 and "this torch has no torch.nn.functional.grouped_mm" in str(report)
    assert all(torch.equal(found[key], own[key]) for key in own)


@pytest.mark.skipif(torch_is_missing() is not None, reason=str(torch_is_missing()))
@pytest.mark.parametrize("sentinels", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe.Qwen3MoeExperts", "aria.AriaExperts", "gpt_oss.GptOssExperts"])
def test_the_torch_implementation(name: str, sentinels: bool) -> None:
    """The same patch where there is no NPU, for debugging."""
    module, given = case(name)
    own = outputs_and_gradients(module, given)
    if sentinels:
        elsewhere = given.indices == 2
        weights = given.router_weights.masked_fill(elsewhere, 0.0)
        own = outputs_and_gradients(module, Routing(given.tokens, given.indices.masked_fill(elsewhere, 0), weights))
        own["router_weights"] = own["router_weights"].masked_fill(elsewhere, 0.0)
        given = Routing(given.tokens, given.indices.masked_fill(elsewhere, EXPERTS), weights)
    module.config._experts_implementation = "grouped_mm"
    module._is_expert_parallel = sentinels
    with npu_patch.applied(module, device="cpu", fused_ops=False, fla=False) as report:
        found = outputs_and_gradients(module, given)
    assert ran(report) == 1
    assert apart(found, own) == {}


def test_one_weight_of_a_model_in_bfloat16_and_tokens_in_float32(npu: torch.device) -> None:
    """As under autocast: computed in the dtype of the weights, returned in that of the tokens."""
    module, given = case("qwen3_moe.Qwen3MoeExperts")
    module = module.bfloat16().to(npu)
    module.config._experts_implementation = "grouped_mm"
    tokens, indices, weights = (each.to(npu) for each in (given.tokens, given.indices, given.router_weights))
    own = module(tokens, indices, weights)
    with npu_patch.applied(module, fused_ops=False, fla=False) as report:
        found = module(tokens, indices, weights)
    assert ran(report) == 1
    assert found.dtype == own.dtype == torch.float32
    assert relative_error(found.detach().cpu().double(), own.detach().cpu().double()) < 1e-2
