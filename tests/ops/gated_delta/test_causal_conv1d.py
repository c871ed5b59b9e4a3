"""The causal convolution against its formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from npu_patch import simulator
from npu_patch.ops.gated_delta.causal_conv1d import causal_conv1d, causal_conv1d_update
from tests.support.gradients import relative_error


def formula(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, sequence: Tensor | None = None
) -> Tensor:
    """y `[B, D, T]`, float64, token by token; sequence `[B, T]`."""
    x, weight = x.double(), weight.double()
    columns = []
    for t in range(x.shape[-1]):
        y = torch.zeros_like(x[..., 0]) if bias is None else bias.double().expand_as(x[..., 0])
        for lag in range(min(weight.shape[-1], t + 1)):
            seen = x[..., t - lag]
            if sequence is not None:
                seen = seen * (sequence[:, t] == sequence[:, t - lag])[:, None]
            y = y + weight[:, -1 - lag] * seen
        columns.append(y)
    y = torch.stack(columns, -1)
    return y if activation is None else y * torch.sigmoid(y)


def make(
    tokens: int,
    *,
    batch: int = 2,
    channels: int = 6,
    width: int = 4,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(batch, channels, tokens, generator=generator).to(dtype)
    weight = torch.randn(channels, width, generator=generator).to(dtype)
    return x, weight, torch.randn(channels, generator=generator).to(dtype) if bias else None


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 17])
@pytest.mark.parametrize("activation", ["silu", "swish", None])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [None, "seq_idx", "cu_seqlens"])
def test_forward_and_gradients(tokens: int, activation: str | None, bias: bool, packed: str | None) -> None:
    arguments = make(tokens, batch=1 if packed == "cu_seqlens" else 2, bias=bias)
    bounds = sorted({0, 1, min(3, tokens), min(4, tokens), min(9, tokens), tokens})
    sequence = torch.cat([torch.full((b - a,), n) for n, (a, b) in enumerate(itertools.pairwise(bounds))])
    sequence = sequence.expand(arguments[0].shape[0], -1)
    if packed == "seq_idx" and tokens > 2:
        sequence = torch.stack((sequence[0], torch.arange(tokens) // 2))  # each row has its own
    given = {"seq_idx": {"seq_idx": sequence}, "cu_seqlens": {"cu_seqlens": torch.tensor(bounds)}}.get(packed, {})
    ours, exact = ([x if x is None else x.clone().requires_grad_() for x in arguments] for _ in range(2))
    y = causal_conv1d(*ours, activation=activation, **given)
    expected = formula(*exact, activation, sequence if packed else None)
    weights = torch.randn(y.shape, dtype=y.dtype)
    found = torch.autograd.grad((y * weights).sum(), [x for x in ours if x is not None])
    wanted = torch.autograd.grad((expected * weights).sum(), [x for x in exact if x is not None])
    assert relative_error(y.detach(), expected.detach()) < 1e-14
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_any_width(width: int) -> None:
    x, weight, bias = make(11, width=width)
    assert relative_error(causal_conv1d(x, weight, bias), formula(x, weight, bias, None)) < 1e-14


def test_bfloat16_is_as_the_original_and_rounds_once_if_packed() -> None:
    x, weight, bias = make(200, channels=16, dtype=torch.bfloat16)
    exact = formula(x, weight, bias, "silu")
    theirs = torch.nn.functional.silu(
        torch.nn.functional.conv1d(x, weight[:, None], bias, padding=3, groups=16)[..., :200]
    )
    y = causal_conv1d(x, weight, bias, "silu")
    assert y.dtype == torch.bfloat16 and torch.equal(y, theirs)
    y = causal_conv1d(x, weight, bias, "silu", seq_idx=torch.zeros(2, 200, dtype=torch.int32))
    assert y.dtype == torch.bfloat16
    assert relative_error(y.double(), exact) <= 1.001 * relative_error(exact.bfloat16().double(), exact)


def test_packed_keeps_the_layout_of_the_caller() -> None:
    x, weight, bias = make(9)
    transposed = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    one = torch.zeros(2, 9, dtype=torch.int32)
    y = causal_conv1d(transposed, weight, bias, "silu", seq_idx=one)
    assert y.stride() == transposed.stride()
    assert causal_conv1d(x, weight, bias, "silu", seq_idx=one).stride() == x.stride()
    assert torch.autograd.grad(y.sum(), transposed)[0].stride() == transposed.stride()


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_only_the_gradients_asked_for(wanted: int) -> None:
    arguments = [x.requires_grad_(i == wanted) for i, x in enumerate(make(9))]
    y = causal_conv1d(*arguments, activation="silu", seq_idx=torch.zeros(2, 9, dtype=torch.int32))
    gradients = y.grad_fn.apply(torch.ones_like(y))
    assert [i for i, gradient in enumerate(gradients) if gradient is not None] == [wanted]


@pytest.mark.parametrize("held", [3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3, 6])
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("bias", [True, False])
def test_update_continues_and_keeps_the_state_in_place(
    held: int, tokens: int, activation: str | None, bias: bool
) -> None:
    x, weight, b = make(12 + tokens, bias=bias)
    state = x[..., 12 - held : 12].clone()
    address = state.data_ptr()
    y = causal_conv1d_update(x[..., 12:], state, weight, b, activation)
    assert relative_error(y, formula(x, weight, b, activation)[..., 12:]) < 1e-14
    assert torch.equal(state, x[..., -held:]) and state.data_ptr() == address


@pytest.mark.parametrize("held", [3, 4, 7])
@pytest.mark.parametrize("tokens", [1, 3])
def test_update_in_bfloat16_is_as_the_original_and_as_the_convolution_of_all_tokens(held: int, tokens: int) -> None:
    x, weight, bias = make(7 + tokens, channels=64, dtype=torch.bfloat16)
    theirs = torch.nn.functional.conv1d(x[..., 4:], weight[:, None], bias, groups=64)[..., -tokens:]
    y = causal_conv1d_update(x[..., 7:], x[..., 7 - held : 7].clone(), weight, bias, "silu")
    assert y.dtype == torch.bfloat16 and torch.equal(y, torch.nn.functional.silu(theirs))
    assert torch.equal(y, causal_conv1d(x, weight, bias, "silu")[..., -tokens:])


def test_update_by_one_token_in_four_kernels(npu: torch.device) -> None:
    x, weight, bias = (given.to(npu) for given in make(1, channels=32, dtype=torch.bfloat16))
    state = torch.zeros(2, 32, 4, dtype=torch.bfloat16, device=npu)
    with simulator.count() as counted:
        causal_conv1d_update(x, state, weight, bias, "silu")
    assert counted.launches == 4, counted


def test_what_cannot_be_served_is_refused() -> None:
    x, weight, bias = make(8)
    with pytest.raises(ValueError, match="batch must be 1"):
        causal_conv1d(x, weight, bias, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, bias, "gelu")
    with pytest.raises(ValueError, match=r"\[B, D, T\]"):
        causal_conv1d(x.transpose(1, 2), weight, bias)
    with pytest.raises(ValueError, match="at least 3 tokens"):
        causal_conv1d_update(x, x[..., :2].clone(), weight, bias)


@pytest.mark.usefixtures("simulated")
def test_packed_on_the_npu_without_host_copies(npu: torch.device) -> None:
    x, weight, bias = (tensor.float() for tensor in make(20, batch=1))
    bounds = torch.tensor([0, 2, 9, 20])
    expected = causal_conv1d(x, weight, bias, "silu", cu_seqlens=bounds)
    leaves = [tensor.to(npu).requires_grad_() for tensor in (x, weight, bias)]
    bounds = bounds.to(npu)
    with simulator.count() as counted:
        y = causal_conv1d(*leaves, "silu", cu_seqlens=bounds)
        torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert counted.host_copies == 0
    assert torch.equal(y.detach().cpu(), expected)
