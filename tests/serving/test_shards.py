"""Norms of tensors of which each rank has some rows are served by rank; whoever has parts of rows is left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import npu_patch
from npu_patch.reporting.report import Report
from tests.support.tiny_models import tiny


@pytest.fixture
def mesh() -> Iterator[dist.DeviceMesh]:
    """One process that takes itself for the second of two ranks."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield dist.init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def normed(mesh: dist.DeviceMesh, placement: Placement, dtype: torch.dtype) -> list[torch.Tensor]:
    """This rank's result and gradients of a norm, with the placements of each."""
    norm = tiny("qwen3").model.norm.to(dtype)
    norm.weight = torch.nn.Parameter(DTensor.from_local(norm.weight.detach(), mesh, [Replicate()], run_check=False))
    local = torch.randn(3, 5, norm.weight.shape[0], generator=torch.Generator().manual_seed(2)).to(dtype)
    x = DTensor.from_local(local, mesh, [placement], run_check=False).requires_grad_()
    out = norm(x)
    assert isinstance(out, DTensor) and out.shape == x.shape and out.stride() == torch.empty(x.shape).stride()
    out.backward(DTensor.from_local(local.cos(), mesh, [placement], run_check=False))
    found = [out, x.grad, norm.weight.grad]
    placements = torch.tensor([each.placements == (placement,) for each in found[:2]])
    return [each.to_local().detach() for each in found] + [placements]


def ran(report: Report) -> tuple[int, list[str]]:
    (norms,) = [o for o in report if o.patch == "rms_norm"]
    return norms.calls.ran, list(norms.calls.fell_through)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Shard(-2), Replicate()], ids=str)
def test_own_rows_are_normalized_with_their_part_of_the_weights_gradient(
    placement: Placement, dtype: torch.dtype, mesh: dist.DeviceMesh
) -> None:
    expected = normed(mesh, placement, dtype)
    report = npu_patch.apply(tiny("qwen3"), device="cpu")
    found = normed(mesh, placement, dtype)
    assert ran(report) == (1, [])
    near = 1e-6 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=near, atol=near)


def test_parts_of_rows_are_left_to_the_original(mesh: dist.DeviceMesh) -> None:
    report = npu_patch.apply(tiny("qwen3"), device="cpu")
    norm = tiny("qwen3").model.norm
    width = norm.weight.shape[0]
    norm.weight = torch.nn.Parameter(DTensor.from_local(norm.weight.detach(), mesh, [Replicate()], run_check=False))
    with torch.no_grad():
        out = norm(DTensor.from_local(torch.randn(3, 5, width // 2), mesh, [Shard(2)], run_check=False))
    assert isinstance(out, DTensor) and out.shape[-1] == width
    assert ran(report) == (0, ["a tensor whose rows are in parts, or a weight that is"])
