"""What a replacement returns may be changed in place, as what its original returns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from npu_patch.ops import rms_norm, rope, swiglu
from npu_patch.ops.gated_delta import rule as gated_delta_rule
from npu_patch.ops.gated_delta.calls import RuleCall
from npu_patch.serving.implementation import Implementation
from npu_patch.serving.op import Op
from tests.support.gradients import relative_error
from tests.support.parity import NEAR

B, N, S, D = 2, 3, 5, 16


def implementations(op: Op, device_type: str) -> list[Implementation]:
    return [each for each in op.implementations if device_type in each.device_types and each.missing() is None]


def heads(device: torch.device, dtype: torch.dtype, seed: int, turned: bool) -> Tensor:
    """`[B, N, S, D]` as projections come, or in memory as it is written."""
    x = torch.randn(B, S, N, D, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    x = x if turned else x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.requires_grad_()


def rotated(run: Callable[..., Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    cos, sin = (torch.randn(1, 1, S, D, generator=torch.Generator().manual_seed(seed)).to(q) for seed in (8, 9))
    return run([q.transpose(1, 2), k.transpose(1, 2)], cos, sin, rope.VARIANTS[0])


def rotated_in_part(run: Callable[..., Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    cos, sin = (torch.randn(1, 1, S, D // 2, generator=torch.Generator().manual_seed(seed)).to(q) for seed in (8, 9))
    return run([q.transpose(1, 2), k.transpose(1, 2)], cos, sin, rope.VARIANTS[0])


def normalized(run: Callable[..., Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    weight = torch.rand(D).to(q)
    return [run(rms_norm.PLAIN_VARIANTS[0], each.transpose(1, 2), weight, 1e-6, None) for each in (q, k)]


def multiplied(run: Callable[..., Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    return [run(q.flatten(0, 2), k.flatten(0, 2))]


def recurred(run: Callable[..., Tensor], q: Tensor, k: Tensor) -> list[Tensor]:
    g, beta = (torch.rand(B, S, N, generator=torch.Generator().manual_seed(7)).to(q.device) for _ in range(2))
    o, final = gated_delta_rule.chunk_gated_delta_rule(RuleCall(q, k, q * k, -g, beta, output_final_state=True))
    return [o, final]


OPS = {
    "rope": (rope.ROPE, rotated),
    "rope of a part": (rope.ROPE, rotated_in_part),
    "rms_norm": (rms_norm.RMS_NORM, normalized),
    "swiglu": (swiglu.SWIGLU, multiplied),
}
CASES = [
    pytest.param(call, each.run, device_type, id=f"{name}-{each.name}")
    for name, (op, call) in OPS.items()
    for device_type in ("npu", "cpu")
    for each in implementations(op, device_type)
]
CASES += [pytest.param(recurred, None, device_type, id=f"gated delta-{device_type}") for device_type in ("npu", "cpu")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "turned"])
@pytest.mark.parametrize(("call", "run", "device_type"), CASES)
def test_a_result_may_be_changed_in_place(
    call: Callable[..., list[Tensor]],
    run: Callable[..., Tensor],
    device_type: str,
    turned: bool,
    dtype: torch.dtype,
    two_cores: None,
) -> None:
    device = torch.device(device_type)
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        q, k = (heads(device, dtype, seed, turned) for seed in (1, 2))
        results = call(run, q, k)
        results = [each.mul_(0.5).add_(1) if in_place else each * 0.5 + 1 for each in results]
        sum(each.float().square().sum() for each in results).backward()
        found.append([q.grad.float(), k.grad.float()])
    assert all(relative_error(*pair) < NEAR for pair in zip(*found, strict=True))
