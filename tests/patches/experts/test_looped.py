"""Blocks that loop over a ModuleList of experts, and packed experts that ask no registry, as in transformers 4."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

import npu_patch
from npu_patch import simulator
from npu_patch.patches.experts import patch as experts_patch
from tests.support.gradients import loss_and_gradients, relative_error
from tests.support.parity import NEAR, apart
from tests.support.tiny_models import tiny, tiny_batch

EXPERTS, CHOICES, HIDDEN, INNER = 5, 2, 24, 16
IDENTITIES = 2


class FeedForward(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(HIDDEN, width, bias=False)
        self.up_proj = torch.nn.Linear(HIDDEN, width, bias=False)
        self.down_proj = torch.nn.Linear(width, HIDDEN, bias=False)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SoftmaxBlock(torch.nn.Module):
    """As in mixtral, olmoe and qwen3_moe."""

    def __init__(self, norm_topk_prob: bool = True) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = EXPERTS, CHOICES, norm_topk_prob
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList([FeedForward(INNER) for _ in range(EXPERTS)])
        self.jitter_noise = 0.0

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and self.jitter_noise > 0:
            hidden_states = hidden_states * torch.empty_like(hidden_states).uniform_(1.0 - self.jitter_noise, 1.0)
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        router_logits = self.gate(flat)
        weights, selected = torch.topk(F.softmax(router_logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights /= weights.sum(dim=-1, keepdim=True)
        result = self.loop(flat, selected, weights.to(flat.dtype))
        return result.reshape(hidden_states.shape), router_logits

    def loop(self, flat: torch.Tensor, selected: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(flat)
        for index in range(len(self.experts)):
            expert = self.experts[index]
            top_x, choice = torch.where(selected == index)
            result.index_add_(0, top_x, (expert(flat[top_x]) * weights[top_x, choice, None]).to(flat.dtype))
        return result


class SharedBlock(SoftmaxBlock):
    """As in qwen2_moe and qwen3_next."""

    def __init__(self) -> None:
        super().__init__(norm_topk_prob=False)
        self.shared_expert, self.shared_expert_gate = FeedForward(40), torch.nn.Linear(HIDDEN, 1, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        router_logits = self.gate(flat)
        weights, selected = torch.topk(F.softmax(router_logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        result = torch.zeros_like(flat)
        for index in range(len(self.experts)):
            top_x, choice = torch.where(selected == index)
            expert_layer = self.experts[index]
            result.index_add_(0, top_x, expert_layer(flat[top_x]) * weights.to(flat.dtype)[top_x, choice, None])
        shared = torch.sigmoid(self.shared_expert_gate(flat)) * self.shared_expert(flat)
        return (result + shared).reshape(hidden_states.shape), router_logits


class GivenBlock(torch.nn.Module):
    """As in deepseek_v3 and longcat_flash: the method is given the choice; the last experts return their tokens."""

    def __init__(self) -> None:
        super().__init__()
        identities = [torch.nn.Identity() for _ in range(IDENTITIES)]
        self.experts = torch.nn.ModuleList([FeedForward(INNER) for _ in range(EXPERTS)] + identities)
        self.gate = torch.nn.Linear(HIDDEN, EXPERTS + IDENTITIES, bias=False)

    def moe(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        result = torch.zeros_like(hidden_states, dtype=weights.dtype)
        for index in range(len(self.experts)):
            expert = self.experts[index]
            token, choice = torch.where(indices == index)
            if token.numel() > 0:
                result.index_add_(0, token, expert(hidden_states[token]) * weights[token, choice].unsqueeze(-1))
        return result.type(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        weights, indices = self.gate(flat).float().sigmoid().topk(CHOICES, -1)
        return self.moe(flat, indices, weights).view(hidden_states.shape), None


BLOCKS = {
    "softmax": SoftmaxBlock,
    "not normalised": lambda: SoftmaxBlock(norm_topk_prob=False),
    "shared": SharedBlock,
    "given": GivenBlock,
}


def block(name: str) -> Any:
    torch.manual_seed(0)
    module = BLOCKS[name]()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2.0)
    return module.train()


def results(module: Any, npu: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2, 7, HIDDEN, generator=generator).to(npu).requires_grad_(True)
    module.zero_grad(set_to_none=True)
    result, logits = module(x)
    result.backward(torch.randn(result.shape, generator=generator).to(npu))
    found = {"result": result, "x": x.grad} | ({} if logits is None else {"logits": logits})
    found |= {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def calls_of(report: npu_patch.Report) -> tuple[int, dict[str, int]]:
    outcomes = [o for o in report if o.patch == "experts"]
    fell_through = {key: count for o in outcomes for key, count in o.calls.fell_through.items()}
    return sum(o.calls.ran for o in outcomes), fell_through


@pytest.mark.parametrize("name", BLOCKS)
def test_a_looped_block(name: str, npu: torch.device) -> None:
    module = block(name).to(npu)
    own = results(module, npu)
    with npu_patch.applied(module, fused_ops=False) as report:
        found = results(module, npu)
    assert calls_of(report) == (1, {}), report
    assert found.keys() == own.keys()
    assert apart(found, own) == {}


def test_nothing_waits_for_the_device_and_no_weight_is_copied(npu: torch.device) -> None:
    if not simulator.is_active():
        pytest.skip("counted on the simulated NPU")
    module = block("softmax").to(npu)
    for parameter in module.experts.parameters():
        parameter.requires_grad_(False)
    x = torch.randn(2, 7, HIDDEN, device=npu, requires_grad=True)
    with npu_patch.applied(module, fused_ops=False):
        module(x)
        with simulator.count() as counted:
            module(x)[0].backward(torch.ones_like(x))
    assert counted.host_copies == 0, counted.host_copies_by_op
    assert counted.by_op["npu::npu_grouped_matmul"][0] == 6
    assert "aten::stack" not in counted.by_op


def test_jitter_is_not_skipped(npu: torch.device) -> None:
    """A block that would draw random numbers runs itself; and observing it draws none."""
    module = block("softmax").to(npu)
    module.jitter_noise = 0.3
    state = torch.get_rng_state()
    with npu_patch.applied(module, fused_ops=False) as report:
        assert torch.equal(torch.get_rng_state(), state)
        results(module, npu)
        assert calls_of(report)[0] == 0 and sum(calls_of(report)[1].values()) == 1
        results(module.eval(), npu)
        assert calls_of(report)[0] == 1


def _lora(module: Any) -> Any:
    return get_peft_model(module, LoraConfig(r=2, target_modules=["up_proj"]))


def _hooked(module: Any) -> Any:
    module.experts[1].register_forward_hook(lambda *_: None)
    return module


def _biased(module: Any) -> Any:
    module.experts[2].down_proj.bias = torch.nn.Parameter(torch.ones(HIDDEN))
    return module


@pytest.mark.parametrize("change", [_lora, _hooked, _biased])
def test_experts_that_are_more_than_their_weights_run_themselves(change: Any, npu: torch.device) -> None:
    module = change(block("softmax")).to(npu)
    own = results(module, npu)
    with npu_patch.applied(module, fused_ops=False) as report:
        found = results(module, npu)
    ran, fell_through = calls_of(report)
    assert ran == 0 and len(fell_through) == 1
    assert found.keys() == own.keys()
    assert all(torch.equal(found[key], own[key]) for key in own)


class RoutedTwice(SoftmaxBlock):
    """One that takes twice the sum."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = hidden_states.view(-1, hidden_states.shape[-1])
        logits = self.gate(flat)
        weights, selected = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        assert len(self.experts)
        return 2 * self.loop(flat, selected, weights.to(flat.dtype)).reshape(hidden_states.shape), logits


def test_another_formula_is_left_alone_and_said(npu: torch.device) -> None:
    torch.manual_seed(0)
    module = RoutedTwice().to(npu)
    with npu_patch.applied(module, fused_ops=False) as report:
        results(module, npu)
    assert calls_of(report) == (0, {})
    assert any("RoutedTwice" in outcome.site for outcome in report.skipped if outcome.patch == "experts")


class DenseWeightExperts(torch.nn.Module):
    """As in transformers 4's qwen3_vl_moe: [E, H, 2 I], dense router weights before the indices."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.expert_dim = EXPERTS, HIDDEN, INNER
        self.gate_up_proj = torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * INNER) / 5)
        self.down_proj = torch.nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN) / 5)
        self.act_fn = torch.nn.SiLU()

    def forward(self, hidden_states: Any, routing_weights: Any, router_indices: Any) -> torch.Tensor:
        batch_size = hidden_states.shape[0]
        hidden_states = hidden_states.reshape(-1, self.hidden_size)
        result = torch.zeros_like(hidden_states)
        for index in range(self.num_experts):
            token, _ = torch.where(router_indices == index)
            gate, up = (hidden_states[token] @ self.gate_up_proj[index]).chunk(2, dim=-1)
            out = (up * self.act_fn(gate)) @ self.down_proj[index]
            result.index_add_(0, token, out * routing_weights[token, index, None])
        return result.view(batch_size, -1, self.hidden_size)


def test_dense_router_weights_in_another_order(npu: torch.device) -> None:
    torch.manual_seed(0)
    module = DenseWeightExperts().to(npu)
    x = torch.randn(2, 7, HIDDEN, device=npu, requires_grad=True)
    top = torch.rand(14, EXPERTS).topk(CHOICES, -1)
    dense = torch.zeros(14, EXPERTS).scatter(1, top.indices, top.values).to(npu).requires_grad_(True)
    indices = top.indices.to(npu)
    found = []
    for applied in (False, True):
        module.zero_grad(set_to_none=True)
        x.grad = dense.grad = None
        with npu_patch.applied(module, patch=applied) as report:
            result = module(x, dense, indices)
            result.square().sum().backward()
        assert result.shape == x.shape
        found.append([t.detach().cpu().double() for t in (result, x.grad, dense.grad, module.down_proj.grad)])
    assert calls_of(report) == (1, {})
    assert all(relative_error(one, other) < NEAR for one, other in zip(found[1], found[0], strict=True))


@pytest.mark.skipif(bool(experts_patch.registry()), reason="transformers 5 has no looped experts")
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "glm4_moe"])
def test_models_of_transformers_4(family: str, npu: torch.device) -> None:
    model = tiny(family).to(npu)
    batch = tiny_batch()
    own = loss_and_gradients(model, batch)
    with npu_patch.applied(model, fused_ops=False, fla=False) as report:
        found = loss_and_gradients(copy.deepcopy(model), batch)
    assert calls_of(report)[0] > 0 and not calls_of(report)[1], report
    # An expert that no token chose has a gradient of zeros here and none there.
    assert all(not found[name].any() for name in found.keys() - own.keys())
    for name in own:
        if not name.endswith(("dt_bias", "A_log")):  # small differences of large numbers, in the gated delta rule
            assert relative_error(found[name], own[name]) < NEAR, name
