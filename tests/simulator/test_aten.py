"""Aten operators on the simulated NPU: values, gradients, dtypes and strides are the CPU's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.torch_npu_operators import needs_operator

pytestmark = pytest.mark.usefixtures("simulated")


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)
ROWS = torch.tensor([0, 2])
REPEATED_ROWS = torch.tensor([0, 2, 2])
IDS = torch.randint(0, 3, (3, 8), generator=GENERATOR)
LABELS = torch.tensor([1, -100, 3, 7, 0])
OFFSETS = torch.tensor([3, 7, 10], dtype=torch.int32)


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


# name, function, inputs
CASES: list[tuple[str, Callable[..., Any], tuple[Tensor, ...]]] = [
    ("rms_norm", lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (randn(3, 4, 8), randn(8))),
    ("linear", F.linear, (randn(2, 3, 4), randn(5, 4), randn(5))),
    ("bmm", torch.bmm, (randn(2, 3, 4), randn(2, 4, 5))),
    ("addmm", torch.addmm, (randn(3, 5), randn(3, 4), randn(4, 5))),
    ("baddbmm", torch.baddbmm, (randn(2, 3, 5), randn(2, 3, 4), randn(2, 4, 5))),
    ("matmul vector", torch.matmul, (randn(2, 3, 4), randn(4))),
    ("vector matmul", torch.matmul, (randn(4), randn(2, 4, 3))),
    ("matmul broadcast", torch.matmul, (randn(5, 1, 3, 4), randn(2, 4, 3))),
    ("einsum", lambda a, b: torch.einsum("bhqd,bhkd->bhqk", a, b), (randn(2, 3, 4, 5), randn(2, 3, 6, 5))),
    ("conv1d", lambda x, w, b: F.conv1d(x, w, b, padding=3, groups=6), (randn(2, 6, 9), randn(6, 1, 4), randn(6))),
    ("conv2d", lambda x, w, b: F.conv2d(x, w, b, stride=2), (randn(2, 3, 9, 9), randn(6, 3, 4, 4), randn(6))),
    ("conv3d", lambda x, w: F.conv3d(x, w, stride=2), (randn(2, 3, 5, 9, 9), randn(6, 3, 2, 4, 4))),
    ("embedding", lambda i, w: F.embedding(i, w, padding_idx=1), (IDS, randn(9, 4))),
    ("layer_norm", lambda x, w, b: F.layer_norm(x, (8,), w, b), (randn(3, 8), randn(8), randn(8))),
    ("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), (randn(3, 8, 4), randn(8), randn(8))),
    ("gelu", F.gelu, (randn(3, 8),)),
    ("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), (randn(3, 8),)),
    ("silu", F.silu, (randn(3, 8),)),
    ("softplus", F.softplus, (randn(3, 8),)),
    ("log_sigmoid", F.logsigmoid, (randn(3, 8),)),
    ("softmax", lambda x: F.softmax(x, -1), (randn(3, 8),)),
    ("softmax float32", lambda x: F.softmax(x, -1, dtype=torch.float32), (randn(3, 8).bfloat16(),)),
    ("log_softmax", lambda x: F.log_softmax(x, -1), (randn(3, 8),)),
    ("cross_entropy", lambda x: F.cross_entropy(x, LABELS.to(x.device)), (randn(5, 8),)),
    ("smoothed", lambda x: F.cross_entropy(x, LABELS.to(x.device), label_smoothing=0.1), (randn(5, 8),)),
    ("kl_div", lambda x, y: F.kl_div(x, y.detach().softmax(-1), reduction="batchmean"), (randn(5, 8), randn(5, 8))),
    ("kl_div of the target", lambda x, y: F.kl_div(x, y.softmax(-1), reduction="batchmean"), (
        randn(5, 8), randn(5, 8))),
    ("bce", lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach().sigmoid()), (randn(5, 8), randn(5, 8))),
    ("l1, mse", lambda x, y: F.l1_loss(x, y) + F.mse_loss(x, y), (randn(5, 8), randn(5, 8))),
    ("cumsum", lambda x: x.cumsum(-1), (randn(3, 8),)),
    ("topk", lambda x: x.topk(3), (randn(3, 8),)),
    ("sort", lambda x: x.sort(-1, descending=True), (randn(3, 8),)),
    ("argsort", lambda x: x.argsort(dim=-1, stable=True), (randn(3, 8),)),
    ("gather", lambda x, i: x.gather(0, i), (randn(3, 8), IDS)),
    ("scatter_add", lambda x, i, s: x.scatter_add(0, i, s), (randn(3, 8), IDS, randn(3, 8))),
    ("index_add", lambda x, i, s: x.index_add(0, i, s), (randn(3, 8), ROWS, randn(2, 8))),
    ("index_add_", lambda x, i, s: x.clone().index_add_(0, i, s), (randn(3, 8), ROWS, randn(2, 8))),
    ("index_select", lambda x, i: x.index_select(1, i), (randn(3, 8), REPEATED_ROWS)),
    ("masked_fill", lambda x: x.masked_fill(x > 0, -1.0), (randn(3, 8),)),
    ("where", lambda x, y: torch.where(x > 0, x, y), (randn(3, 8), randn(3, 8))),
    ("tril, triu", lambda x: x.tril(1) + x.triu(2), (randn(8, 8),)),
    ("histc", lambda i: torch.histc(i.float(), 5, 0, 5), (IDS,)),
    ("bincount", lambda i: torch.bincount(i.flatten(), minlength=7), (IDS,)),
    ("one_hot", lambda i: F.one_hot(i, 6), (IDS,)),
    ("nonzero", lambda x: (x > 0).nonzero(), (randn(3, 8),)),
    ("masked_select", lambda x: x[x > 0], (randn(3, 8),)),
    ("unique", lambda i: torch.unique(i, return_inverse=True, return_counts=True), (IDS,)),
    ("index", lambda x, i: x[i, 1:3], (randn(3, 8), REPEATED_ROWS)),
    ("index_put", put, (randn(3, 8), ROWS, randn(2, 8))),
    ("accumulate", lambda x, i, v: x.index_put((i,), v, accumulate=True), (randn(3, 8), REPEATED_ROWS, randn(3, 8))),
    ("mask put", lambda x: put(x, x > 0, 1.0), (randn(3, 8),)),
    ("cat, split", lambda x, y: torch.cat([x, y], -1).split([5, 7], -1), (randn(3, 8), randn(3, 4))),
    ("repeat_interleave", lambda x, r: x.repeat_interleave(r, 0), (randn(3, 8), torch.tensor([1, 0, 2]))),
    ("expand contiguous", lambda x: x[:, None].expand(3, 4, 8).contiguous(), (randn(3, 8),)),
    ("transposed", lambda x: x.t() * 2, (randn(3, 8),)),
    ("flip, roll, pad", lambda x: F.pad(x.flip(0).roll(1, 1), (1, 2)), (randn(3, 8),)),
    ("reductions", lambda x: x.amax(-1) + x.var(-1) + x.norm(dim=-1) + x.logsumexp(-1) + x.max(-1)[0], (randn(3, 8),)),
    ("view_as_complex", lambda x: torch.view_as_real(torch.view_as_complex(x).conj() * 2j), (randn(3, 4, 2),)),
    ("solve_triangular", lambda a, b: torch.linalg.solve_triangular(
        a.tril() + 5 * torch.eye(4, device=a.device), b, upper=False), (randn(4, 4), randn(4, 2))),
    ("grouped_mm", lambda a, b, o: F.grouped_mm(a, b, offs=o), (
        randn(10, 16).bfloat16(), randn(3, 16, 8).bfloat16(), OFFSETS)),
    ("interpolate", lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (randn(1, 2, 3, 3),)),
    ("float16 conv", F.conv1d, (randn(2, 6, 9).half(), randn(6, 3, 4).half().repeat(1, 2, 1))),
    ("empty", lambda x: torch.cat([x[:0], x]) @ x.t()[:, :0], (randn(3, 8),)),
    ("sdpa float mask", lambda q, m: F.scaled_dot_product_attention(q, q, q, m), (randn(1, 2, 5, 8), randn(5, 5))),
]  # fmt: skip


# What a torch, or a torch_npu, may lack.
MARKS = {
    "kl_div of the target": needs_operator("kl_div_target_backward"),  # without it that gradient is left out
    "grouped_mm": pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm"),
}


@pytest.mark.parametrize(
    ("function", "inputs"),
    [pytest.param(*case, id=name, marks=MARKS.get(name, ())) for name, *case in CASES],
)
def test_values_gradients_dtypes_and_strides(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], npu: torch.device
) -> None:
    on_cpu = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    on_npu = [x.detach().clone().to(npu).requires_grad_(x.is_floating_point()) for x in inputs]
    expected, actual = function(*on_cpu), function(*on_npu)
    pairs = list(zip(expected, actual, strict=True) if isinstance(expected, list | tuple) else [(expected, actual)])
    for cpu, device in pairs:
        assert device.device == npu
        assert (device.shape, device.dtype, device.stride()) == (cpu.shape, cpu.dtype, cpu.stride())
        torch.testing.assert_close(device.cpu(), cpu)
    cpu, device = pairs[0]
    if cpu.requires_grad:
        grad = torch.randn_like(cpu)
        cpu.backward(grad)
        device.backward(grad.to(npu))
        for x, y in zip(on_cpu, on_npu, strict=True):
            if x.grad is not None:
                torch.testing.assert_close(y.grad.cpu(), x.grad)


def test_integer_histc(npu: torch.device) -> None:
    counts = torch.histc(torch.tensor([0, 1, 1, 4], device=npu), bins=5, min=0, max=5)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [1, 2, 0, 0, 1]


def test_in_place_changes_reach_every_view(npu: torch.device) -> None:
    x = torch.zeros(3, 4, device=npu)
    x[:, 1:3].add_(5)
    assert x.cpu().sum() == 30
    x.t_()
    assert x.shape == (4, 3)


def test_out_arguments(npu: torch.device) -> None:
    x = randn(3, 4).to(npu)
    resized = torch.add(x, 1, out=torch.empty(0, device=npu))
    strided = torch.empty(4, 3, device=npu).t()
    torch.add(x, 1, out=strided)
    itself = x.clone()
    torch.mul(itself, itself, out=itself)
    assert torch.equal(resized, x + 1)
    assert torch.equal(strided, x + 1)
    assert torch.equal(itself, x * x)


def test_foreach(npu: torch.device) -> None:
    tensors = [torch.ones(3, device=npu), torch.ones(2, device=npu)]
    torch._foreach_add_(tensors, 1.0)
    torch._foreach_mul_(tensors, torch.tensor(2.0, device=npu))
    assert [t.sum().item() for t in tensors] == [12, 8]


@pytest.mark.parametrize("kwargs", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_adamw(kwargs: dict[str, bool], npu: torch.device) -> None:
    on_cpu = [torch.nn.Parameter(randn(3, 4)), torch.nn.Parameter(randn(5))]
    on_npu = [torch.nn.Parameter(p.detach().to(npu)) for p in on_cpu]
    optimizers = torch.optim.AdamW(on_cpu, lr=0.1), torch.optim.AdamW(on_npu, lr=0.1, **kwargs)
    for _ in range(3):
        for cpu, device in zip(on_cpu, on_npu, strict=True):
            cpu.grad = randn(*cpu.shape)
            device.grad = cpu.grad.to(npu)
        for parameters, optimizer in zip((on_cpu, on_npu), optimizers, strict=True):
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
    for cpu, device in zip(on_cpu, on_npu, strict=True):
        torch.testing.assert_close(device.cpu(), cpu)


def test_a_cpu_tensor_among_npu_tensors_is_an_error(npu: torch.device) -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=npu) + torch.ones(3)
    assert (torch.ones(3, device=npu) * torch.tensor(2.0)).device == npu


def test_unwritten_memory_is_not_zero(npu: torch.device) -> None:
    torch.zeros(1000, device=npu)  # its block is free again
    assert torch.empty(1000, device=npu).isnan().all()
    assert torch.empty_like(torch.zeros(3, device=npu)).isnan().all()


def test_grad_scaler_and_autocast(npu: torch.device) -> None:
    model = torch.nn.Linear(4, 3).to(npu)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("npu", init_scale=8.0)
    for value, expected_scale in ((1.0, 8.0), (float("inf"), 4.0)):
        with torch.autocast("npu", dtype=torch.float16):
            output = model(torch.full((2, 4), value, device=npu))
        assert output.dtype == torch.float16
        scaler.scale(output.float().sum()).backward()
        before = model.weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.weight, before) == (value != 1.0)
        assert scaler.get_scale() == expected_scale
        optimizer.zero_grad()
