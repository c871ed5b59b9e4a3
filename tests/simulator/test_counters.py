"""Launches, bytes and host copies of known snippets."""

import pytest
import torch
import torch_npu

from npu_patch import simulator
from tests.support.torch_npu_operators import sdpa_operator

pytestmark = pytest.mark.usefixtures("simulated")


def test_launches_and_bytes(npu: torch.device) -> None:
    x, y = torch.ones(3, 8, device=npu), torch.ones(8, device=npu)
    with simulator.count() as counted:
        z = x + y.expand(3, 8)  # a broadcast input counts its 8 elements
        z.mul_(2)  # read and written
        z.t().view(8, 3)[1:]  # views are no launches
        z.zero_()  # only written
        torch.mm(x, z.t(), out=torch.empty(3, 3, device=npu))
    assert counted.by_op == {
        "aten::add": (1, 4 * (24 + 8 + 24)),
        "aten::mul_": (1, 4 * (24 + 24)),
        "aten::zero_": (1, 4 * 24),
        "aten::mm": (1, 4 * (24 + 24 + 9)),
    }
    assert counted.launches == 4
    assert counted.bytes == sum(moved for _, moved in counted.by_op.values())
    assert counted.host_copies == 0


def test_backward_is_counted(npu: torch.device) -> None:
    x = torch.ones(3, 8, device=npu, requires_grad=True)
    gamma = torch.ones(8, device=npu, requires_grad=True)
    y = torch_npu.npu_rms_norm(x, gamma)[0]
    grad = torch.ones_like(y)
    with simulator.count() as counted:
        y.backward(grad)
    assert counted.by_op == {"npu::npu_rms_norm_backward": (1, 4 * (24 + 24 + 8 + 3 + 24 + 8))}


@pytest.mark.parametrize(("frozen", "launches"), [(False, 2), (True, 1)])
def test_a_linear_layers_backward_is_a_product_for_each_gradient(
    npu: torch.device, frozen: bool, launches: int
) -> None:
    x = torch.ones(2, 3, 8, device=npu, requires_grad=True)
    weight = torch.ones(5, 8, device=npu, requires_grad=not frozen)
    y = torch.nn.functional.linear(x, weight)
    grad = torch.ones_like(y)
    with simulator.count() as counted:
        y.backward(grad)
    moved = 4 * (30 + 40 + 48) + (0 if frozen else 4 * (30 + 48 + 40))
    assert counted.by_op["aten::matmul_backward"] == (launches, moved)


def test_fused_attention_is_one_launch(npu: torch.device) -> None:
    q, k = torch.ones(2, 4, 5, 8, device=npu), torch.ones(2, 2, 7, 8, device=npu)
    with simulator.count() as counted:
        torch.nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)
    assert counted.by_op == {f"npu::{sdpa_operator()}": (1, 4 * (320 + 2 * 224 + 320 + 2 * 2 * 4 * 5 * 8))}


def test_a_copy_inside_a_fused_operator_is_counted(npu: torch.device) -> None:
    x, gamma = torch.ones(8, 3, device=npu).t(), torch.ones(8, device=npu)
    with simulator.count() as counted:
        torch_npu.npu_rms_norm(x, gamma)
    assert counted.by_op["contiguous(inside npu_rms_norm)"] == (1, 4 * 48)
    assert counted.launches == 2


def test_foreach_is_one_launch(npu: torch.device) -> None:
    tensors = [torch.ones(3, device=npu), torch.ones(2, device=npu)]
    with simulator.count() as counted:
        torch._foreach_mul_(tensors, 2.0)
    assert counted.by_op == {"aten::_foreach_mul_": (1, 4 * 10)}


def test_host_copies(npu: torch.device) -> None:
    x = torch.ones(3, device=npu)
    with simulator.count() as counted:
        x[0].item()
        x.cpu()
        x.nonzero()
        x[x > 0]
        torch.equal(x, x)
        x[x > 0] = torch.ones(3, device=npu)
        x.long().bincount(minlength=4)  # reads the smallest and the largest
        x[torch.zeros(1, dtype=torch.long, device=npu)]  # integer indices do not wait
        x.long().histc(4, 0, 4)
    assert counted.host_copies == 8
    assert counted.host_copies_by_op["aten::_local_scalar_dense"] == (1, 4)
    assert sum(times for times, _ in counted.host_copies_by_op.values()) == 8
    with simulator.count() as counted:
        torch.ones(3).to(npu)
    assert (counted.host_copies, counted.launches, counted.uploads, counted.upload_bytes) == (0, 0, 1, 12)


def test_counts_nest(npu: torch.device) -> None:
    x = torch.ones(3, device=npu)
    with simulator.count() as outer:
        x + 1
        with simulator.count() as inner:
            x + 1
    x + 1
    assert (outer.launches, inner.launches) == (2, 1)
    assert "2 launches" in str(outer)
