"""Experts in int8: exact sums, every operator like plain torch, gradients of tokens and router weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npu_patch.ops.experts.routed import silu_of_halves
from npu_patch.ops.w8a8 import experts_npu
from npu_patch.ops.w8a8.experts import TORCH, Int8Experts, Int8Weights, int8_experts
from npu_patch.ops.w8a8.experts_npu import NPU
from npu_patch.ops.w8a8.experts_op import INT8_EXPERTS, case, why_unsupported_by_npu
from npu_patch.ops.w8a8.quantised import by_token
from npu_patch.simulator.counters import count
from tests.support.largest_tensor import LargestFloat

HIDDEN, TOKENS, EXPERTS, CHOICES = 48, 11, 5, 2
IDLE = 3  # the expert without a token
FUSED, NARROW = 64, 40  # inner widths with and without npu_dequant_swiglu_quant
KERNELS = {"npu": NPU, "cpu": TORCH}


def gelu_of_half(u: Tensor) -> Tensor:
    gate, up = u.chunk(2, -1)
    return F.gelu(gate) * (up + 1)


def weights(experts: int, width_out: int, width_in: int, seed: int, dtype: torch.dtype, turned: bool) -> Int8Weights:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (experts, width_out, width_in), generator=generator, dtype=torch.int8)
    scale = (torch.rand(experts, width_out, generator=generator) + 0.5) / 127 / width_in**0.5
    return Int8Weights(values.mT.contiguous().mT if turned else values, scale.to(dtype))


def layer(
    inner: int = FUSED,
    dtype: torch.dtype = torch.bfloat16,
    gate: Any = None,
    turned: bool = False,
    experts: int = EXPERTS,
) -> Int8Experts:
    up = weights(experts, 2 * inner, HIDDEN, 1, dtype, turned)
    return Int8Experts(up, weights(experts, HIDDEN, inner, 2, dtype, turned), gate)


def routing(dtype: torch.dtype, experts: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype)
    busy = torch.tensor([each for each in range(experts) if each != IDLE])
    indices = torch.stack([busy[torch.randperm(len(busy), generator=generator)[:CHOICES]] for _ in range(TOKENS)])
    return tokens, indices, torch.rand(indices.shape, generator=generator).to(dtype)


def on(device: torch.device | str, experts: Int8Experts) -> Int8Experts:
    up, down = (Int8Weights(each.values.to(device), each.scale.to(device)) for each in (experts.up, experts.down))
    return Int8Experts(up, down, experts.gate)


def by_hand(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> Tensor:
    """A choice at a time, in int32 and float32."""
    y = torch.zeros(tokens.shape)
    for token in range(len(tokens)):
        for choice, expert in enumerate(indices[token].tolist()):
            u = _product(tokens[token].float(), experts.up, expert)
            if experts.gate is None:
                half = len(u) // 2
                hidden = u[:half] * torch.sigmoid(u[:half]) * u[half:]
            else:
                hidden = experts.gate(u.to(tokens.dtype)).float()
            y[token] += router_weights[token, choice].float() * _product(hidden, experts.down, expert)
    return y


def _product(row: Tensor, weights: Int8Weights, expert: int) -> Tensor:
    scale = row.abs().max() / 127
    sums = weights.values[expert].int() @ (row / scale).round().int()
    return sums.float() * weights.scale[expert].float() * scale


@torch.no_grad()
def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double().cpu() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("gate", [None, gelu_of_half])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", [FUSED, NARROW])
def test_plain_torch_is_the_definition_by_hand(inner: int, turned: bool, gate: Any) -> None:
    experts, call = layer(inner, torch.float32, gate, turned), routing(torch.float32)
    assert apart(int8_experts(TORCH, *call, experts), by_hand(*call, experts)) < 1e-6


@pytest.mark.parametrize("gate", [None, gelu_of_half])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("inner", "experts"), [(FUSED, EXPERTS), (NARROW, EXPERTS), (FUSED, 2)])
def test_operators_compute_what_plain_torch_does(
    inner: int, experts: int, turned: bool, scales: torch.dtype, dtype: torch.dtype, gate: Any, npu: torch.device
) -> None:
    own, call = layer(inner, scales, gate, turned, experts), routing(dtype, experts)
    there = [each.to(npu) for each in call]
    assert why_unsupported_by_npu(*there, on(npu, own)) is None
    found = int8_experts(NPU, *there, on(npu, own))
    assert found.dtype == dtype
    # The operators scale by bfloat16 alone for a result in it, and gates of their own are given that.
    as_plain_torch = own.gate is None and inner == FUSED and (dtype, scales) != (torch.bfloat16, torch.float32)
    assert apart(found, int8_experts(TORCH, *call, own)) < (2.0**-7 if as_plain_torch else 2.0**-6)


@pytest.mark.parametrize(("inner", "fused"), [(FUSED, True), (NARROW, False)])
def test_tokens_are_quantised_once_before_they_are_copied_to_their_experts(
    inner: int, fused: bool, npu: torch.device, simulated: None
) -> None:
    own, call = on(npu, layer(inner)), [each.to(npu) for each in routing(torch.bfloat16)]
    with count() as counted:
        int8_experts(NPU, *call, own)
    launches = {name.removeprefix("npu::"): many for name, (many, _) in counted.by_op.items()}
    quantised = 1 if fused else 2
    assert launches["npu_dynamic_quant"] == quantised
    assert launches.get("npu_dequant_swiglu_quant", 0) == fused and launches.get("npu_swiglu", 0) == (not fused)
    assert (launches["npu_grouped_matmul"], launches["npu_moe_token_permute"]) == (2, 2)
    assert counted.host_copies == 0


def straight_through(x: Tensor) -> Tensor:
    values, scale = by_token(x.detach())
    return x + (values.float() * scale[:, None] - x.detach())


def differentiated(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Int8Experts) -> Tensor:
    """By autograd, every expert for every token."""
    up, down = (each.values.float() * each.scale.float()[..., None] for each in (experts.up, experts.down))
    gate = experts.gate or silu_of_halves
    rows = []
    for expert in range(len(up)):
        hidden = gate(straight_through(tokens) @ up[expert].T)
        rows.append(straight_through(hidden) @ down[expert].T)
    chosen = torch.stack(rows)[indices, torch.arange(len(tokens))[:, None]]
    return (chosen * router_weights[..., None]).sum(1)


def gradients(function: Any, call: Sequence[Tensor], experts: Int8Experts, device: Any = "cpu") -> list[Tensor]:
    tokens, indices, router_weights = (each.to(device) for each in call)
    leaves = [tokens.requires_grad_(), router_weights.requires_grad_()]
    y = function(tokens, indices, router_weights, on(device, experts))
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y)
    return [y, *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("gate", [None, gelu_of_half])
@pytest.mark.parametrize("turned", [False, True])
def test_tokens_and_router_weights_get_the_gradient_of_the_dequantised_layer(turned: bool, gate: Any) -> None:
    own, call = layer(FUSED, torch.float32, gate, turned), routing(torch.float32)
    expected = gradients(differentiated, call, own)
    found = gradients(partial(int8_experts, TORCH), call, own)
    assert max(map(apart, found, expected)) < 1e-5


@pytest.mark.parametrize("gate", [None, gelu_of_half])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [FUSED, NARROW])
@pytest.mark.parametrize("columns", [16, None])
def test_gradients_by_operators_are_those_of_plain_torch(
    inner: int, columns: int | None, dtype: torch.dtype, gate: Any, npu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In slices of so many columns, too."""
    if columns is not None:
        monkeypatch.setattr(experts_npu, "SLICE", 1)
    own, call = layer(inner, torch.float32, gate), routing(dtype)
    expected = gradients(partial(int8_experts, TORCH), call, own)
    found = gradients(partial(int8_experts, NPU), call, own, npu)
    assert [each.dtype for each in found] == [dtype] * 3
    assert max(map(apart, found, expected)) < 2.0**-6


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_what_needs_no_gradient_gets_none(device: str, needed: tuple[bool, bool]) -> None:
    tokens, indices, router_weights = (each.to(device) for each in routing(torch.bfloat16))
    for each, wanted in zip((tokens, router_weights), needed, strict=True):
        each.requires_grad_(wanted)
    int8_experts(KERNELS[device], tokens, indices, router_weights, on(device, layer())).sum().backward()
    assert (tokens.grad is not None, router_weights.grad is not None) == needed


@pytest.mark.parametrize("device", KERNELS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, "checkpointed"])
def test_the_bits_are_the_same_with_gradients_and_without(device: str, mode: Any) -> None:
    tokens, indices, router_weights = (each.to(device) for each in routing(torch.bfloat16))
    compute = partial(int8_experts, KERNELS[device], experts=on(device, layer()))
    trained = compute(tokens.requires_grad_(), indices, router_weights)
    if mode == "checkpointed":
        again = checkpoint(compute, tokens, indices, router_weights, use_reentrant=False)
        first, second = (torch.autograd.grad(each.sum(), tokens)[0] for each in (trained, again))
        assert torch.equal(first, second)
    else:
        with mode():
            again = compute(tokens, indices, router_weights)
    assert torch.equal(trained, again)


@pytest.mark.parametrize("device", KERNELS)
def test_the_backward_keeps_the_int8_tokens_and_no_float_of_their_copies(device: str) -> None:
    tokens, indices, router_weights = (each.to(device) for each in routing(torch.bfloat16))
    own, kept = on(device, layer()), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = int8_experts(KERNELS[device], tokens.requires_grad_(), indices, router_weights, own)
    of_weights = {
        each.untyped_storage().data_ptr() for weights in (own.up, own.down) for each in vars(weights).values()
    }
    sizes = sorted(each.nbytes for each in kept if each.untyped_storage().data_ptr() not in of_weights)
    assert sum(sizes) < tokens.numel() + 1024 and y.requires_grad


@pytest.mark.parametrize("device", KERNELS)
def test_no_copy_of_all_weights_exists_in_the_backward(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = on(device, layer(256, experts=64))
    monkeypatch.setattr(experts_npu, "SLICE", 64 * 512 * 2 * 16)
    tokens, indices, router_weights = (each.to(device) for each in routing(torch.bfloat16, 64))
    with LargestFloat() as largest:
        int8_experts(KERNELS[device], tokens.requires_grad_(), indices, router_weights, own).sum().backward()
    assert largest.elements < own.up.values.numel()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"tokens": torch.float32}, "tokens in torch.float32"),
        ({"values": torch.bfloat16}, "weights in torch.bfloat16"),
        ({"width": 47}, "odd width 47"),
        ({"scale": (EXPERTS, 1)}, r"scales \[5, 1\]"),
        ({"rows": 0}, "no tokens"),
    ],
)
def test_what_the_operators_do_not_take_is_said(changed: dict[str, Any], reason: str) -> None:
    tokens, indices, router_weights = routing(changed.get("tokens", torch.bfloat16))
    own = layer()
    width, rows = changed.get("width", HIDDEN), changed.get("rows", TOKENS)
    up = own.up.values[:, :, :width].contiguous().to(changed.get("values", torch.int8))
    up_scale = own.up.scale if "scale" not in changed else own.up.scale[:, :1]
    down = Int8Weights(own.down.values[:, :width], own.down.scale[:, :width])
    call = tokens[:rows, :width], indices[:rows], router_weights[:rows]
    why = why_unsupported_by_npu(*call, Int8Experts(Int8Weights(up, up_scale), down))
    assert why is not None and re.search(reason, why)


@pytest.mark.parametrize("gate", [None, gelu_of_half])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("inner", [FUSED, NARROW])
@pytest.mark.parametrize("scales", [torch.bfloat16, torch.float32])
def test_the_operators_pass_their_check_against_float64(
    scales: torch.dtype, inner: int, turned: bool, gate: Any, npu: torch.device
) -> None:
    own = case(layer(inner, scales, gate, turned), torch.bfloat16)
    implementation = INT8_EXPERTS.implementations[0]
    assert own.why_not_by(implementation) is None
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in own.inputs(12)]
    found = own.call(implementation.run, *(each.to(npu) for each in inputs))
    exact = own.definition(*(each.double() for each in inputs))
    difference = (found.double().cpu() - exact).abs().max() / exact.abs().max()
    assert difference < own.allowed[torch.bfloat16]
