"""Experts in int8: exact sums, every operator like plain torch, gradients of tokens and router weights."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from npu_patch.ops.w8a8 import experts_npu
from npu_patch.ops.w8a8.experts import TORCH, Int8Experts, Int8Weights, int8_experts
from npu_patch.ops.w8a8.experts_npu import NPU
from npu_patch.ops.w8a8.experts_op import INT8_EXPERTS, why_unsupported_by_npu
from npu_patch.ops.w8a8.quantised import by_token

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
    # Rows that fall on the other side of a half after another rounding are a step of int8 apart.
    assert apart(found, int8_experts(TORCH, *call, own)) < 2.0**-7


def test_tokens_are_quantised_once_and_the_gate_needs_no_float_of_the_first_product(npu: torch.device) -> None:
    from tests.support.launched import launched

    own, call = on(npu, layer()), [each.to(npu) for each in routing(torch.bfloat16)]
    with launched() as names:
        int8_experts(NPU, *call, own)
    count = {name: names.count(name) for name in set(names)}
    assert count["npu_dynamic_quant"] == 1 and count["npu_dequant_swiglu_quant"] == 1
    assert count["npu_grouped_matmul"] == 2 and count["npu_moe_token_permute"] == 2
