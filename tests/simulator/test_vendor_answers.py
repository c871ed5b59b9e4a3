"""Where a device answers otherwise than the CPU: options, float64, copies that do not wait, devices, class labels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.usefixtures("simulated")


def test_operators_are_not_compiled_at_run_time() -> None:
    assert torch.npu.is_jit_compile_false()


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (torch.nn.Conv1d(3, 6, 3), (2, 3, 9)),
        (torch.nn.Conv2d(3, 6, 3), (2, 3, 9, 9)),
        (torch.nn.BatchNorm1d(3), (2, 3)),
        (torch.nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (torch.nn.ConvTranspose2d(3, 6, 3), (2, 3, 9, 9)),
        (torch.nn.Linear(3, 6), (2, 3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_modules_keep_their_weights_when_they_move(module: torch.nn.Module, shape: tuple[int, ...]) -> None:
    module = module.eval()
    x = torch.randn(shape)
    expected = module(x)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for _ in range(20):
        moved = module.to("npu")
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in moved.state_dict().items())
        torch.testing.assert_close(moved(x.npu()).cpu(), expected, atol=1e-4, rtol=1e-4)
        module.to("cpu")


@pytest.mark.parametrize(
    ("cast", "dtype"),
    [
        (lambda x: x.double(), torch.float32),
        (lambda x: x.to(torch.float64), torch.float32),
        (lambda x: x.half().double(), torch.float32),
        (lambda x: x.long().double(), torch.float32),
        (lambda x: x.to("cpu", torch.float64), torch.float64),
        (lambda x: x.to("npu:0", torch.float64), torch.float64),
        (lambda x: x.cpu().double().npu(), torch.float64),
    ],
)
def test_float64(cast: Callable[[Tensor], Tensor], dtype: torch.dtype, npu: torch.device) -> None:
    x = torch.tensor([1.0, 2.0], device=npu)
    assert cast(x).dtype == dtype
    assert cast(x).tolist() == [1, 2]


def test_a_cast_to_float64_has_a_gradient(npu: torch.device) -> None:
    x = torch.ones(3, device=npu, requires_grad=True)
    (x.double() * 2).sum().backward()
    assert x.grad.tolist() == [2, 2, 2]


def test_copies_to_the_host_that_do_not_wait_are_pinned(npu: torch.device) -> None:
    x = torch.ones(3, device=npu)
    assert x.to("cpu", non_blocking=True).is_pinned()
    assert not x.to("cpu").is_pinned()
    assert not x.cpu().is_pinned()


N = torch.arange(20.0).view(4, 5)
ROWS = torch.tensor([0, 2])
NUMBER = torch.tensor(2.0)


def put(x: Tensor, index: Any, value: Any) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


@pytest.mark.parametrize(
    "call",
    [
        lambda n: N[ROWS.npu()],
        lambda n: n + N,
        lambda n: N.clone().add_(n),
        lambda n: NUMBER.clone().add_(n[0, 0]),
        lambda n: torch.add(n, n, out=torch.empty(4, 5)),
        lambda n: torch.add(N, N, out=torch.empty(4, 5, device="npu")),
        lambda n: torch.cat([n, N]),
        lambda n: torch.where(N > 0, n, n),
        lambda n: put(n, ROWS.npu(), N[:2]),
        lambda n: n.index_put((ROWS,), N[:2]),
        lambda n: n.index_select(0, ROWS),
        lambda n: n.gather(0, ROWS[None]),
        lambda n: F.embedding(ROWS, n),
        lambda n: F.embedding(ROWS.npu(), N),
        lambda n: F.linear(n, N),
        lambda n: F.layer_norm(n, (5,), torch.ones(5)),
        lambda n: F.cross_entropy(n, torch.tensor([0, 1, 2, 3])),
        lambda n: torch.bucketize(n, torch.tensor([0.0, 1.0])),
        lambda n: n.repeat_interleave(torch.tensor([1, 2, 1, 1]), 0),
        lambda n: n + torch.empty(4, 5, device="meta"),
    ],
)
def test_tensors_of_other_devices_are_refused(call: Callable[[Tensor], Any], npu: torch.device) -> None:
    n = N.to(npu)
    with pytest.raises(RuntimeError, match=r"devices|expected device"):
        call(n)
    assert torch.equal(n.cpu(), N)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: n[ROWS],
        lambda n: n[N > 3],
        lambda n: n.index_put((ROWS,), n[:2]),
        lambda n: put(n, ROWS.to(n.device), NUMBER),
        lambda n: put(n, slice(2), N[:2]),
        lambda n: n * NUMBER,
        lambda n: torch.pow(NUMBER, n),
        lambda n: n.masked_fill(n > 3, NUMBER),
        lambda n: n.clamp(min=NUMBER),
        lambda n: torch.where(n > 3, NUMBER, n),
        lambda n: torch._foreach_mul([n], NUMBER)[0],
        lambda n: n.clone().copy_(N),
    ],
)
def test_numbers_and_indices_may_be_on_the_cpu(call: Callable[[Tensor], Tensor], npu: torch.device) -> None:
    torch.testing.assert_close(call(N.to(npu)).cpu(), call(N))


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, t: F.cross_entropy(x, t),
        lambda x, t: F.cross_entropy(x, t, reduction="none").sum(),
        lambda x, t: F.cross_entropy(x, t, weight=torch.arange(1.0, 6, device=x.device), label_smoothing=0.1),
        lambda x, t: F.nll_loss(x, t),
        lambda x, t: F.cross_entropy(x.view(1, 4, 5).transpose(1, 2), t[None]),
        lambda x, t: F.cross_entropy(x.t().reshape(1, 5, 2, 2), t.view(1, 2, 2)),
        lambda x, t: x.gather(1, t.clamp(min=0)[:, None]).sum(),
        lambda x, t: x.scatter_add(1, t.clamp(min=0)[:, None], x[:, :1]).square().sum(),
    ],
)
def test_class_labels_in_int32(loss: Callable[[Tensor, Tensor], Tensor], npu: torch.device) -> None:
    labels = torch.tensor([0, 1, -100, 3])
    on_cpu, on_npu = (torch.sin(N).to(device).requires_grad_() for device in ("cpu", npu))
    expected, actual = loss(on_cpu, labels), loss(on_npu, labels.int().to(npu))
    expected.backward()
    actual.backward()
    torch.testing.assert_close(actual.cpu(), expected)
    torch.testing.assert_close(on_npu.grad.cpu(), on_cpu.grad)


def test_one_hot_keeps_the_dtype_of_its_labels(npu: torch.device) -> None:
    assert F.one_hot(torch.tensor([0, 2], dtype=torch.int32, device=npu), 3).dtype == torch.int32
    assert F.one_hot(torch.tensor([0, 2], device=npu), 3).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_what_torch_npu_computes_above_autograd_has_its_gradient(npu: torch.device) -> None:
    def both(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        on_cpu, on_npu = x.clone().requires_grad_(), x.to(npu).requires_grad_()
        for y in (on_cpu, on_npu):
            function(y).square().sum().backward()
        torch.testing.assert_close(on_npu.grad.cpu(), on_cpu.grad, atol=1e-4, rtol=1e-4)

    both(lambda x: x.clone().fill_diagonal_(2.0), torch.randn(4, 5))
    both(lambda x: x.clone().fill_diagonal_(2.0, wrap=True), torch.randn(9, 3))
    both(lambda x: torch.slogdet(x)[1], torch.randn(4, 4) + 4 * torch.eye(4))
    both(lambda x: F.affine_grid(x, [2, 1, 3, 3], align_corners=False), torch.randn(2, 2, 3))
