"""Fused operators against float64 formulas written here, forward and backward, in three dtypes and awkward shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from tests.simulator.test_start import python
from tests.support.torch_npu_operators import needs_autograd_kernel

pytestmark = pytest.mark.usefixtures("simulated")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One rounding of the result, and of what the operator rounds on the way.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.2e-2, torch.float16: 2e-3}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def check_operator(
    operator: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    npu: torch.device,
    keep: tuple[str, ...] = (),
) -> None:
    """`operator` on the npu in dtype against `formula` in float64 on the very same (rounded) values; `keep` names
    inputs that stay float32."""
    dtypes = {name: torch.float32 if name in keep else dtype for name in inputs}
    rounded = {name: value.to(dtypes[name]) for name, value in inputs.items()}
    exact = {name: value.double().requires_grad_() for name, value in rounded.items()}
    given = {name: value.to(npu).requires_grad_() for name, value in rounded.items()}
    expected, actual = formula(**exact), operator(**given)
    assert actual.dtype == dtype
    grad = randn(*expected.shape, seed=9).to(dtype)
    expected.backward(grad.double())
    actual.backward(grad.to(npu))
    expect_close(actual, expected, dtype)
    for name, value in given.items():
        assert value.grad.dtype == dtypes[name]
        expect_close(value.grad, exact[name].grad, dtype, name)


def expect_close(actual: Tensor, expected: Tensor, dtype: torch.dtype, name: str = "result") -> None:
    error = (actual.detach().cpu().double() - expected.detach()).abs().max().item()
    assert error <= TOLERANCE[dtype] * max(expected.abs().max().item(), 1.0), name


# ---- normalisation and activation ----


def exact_rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return x / (x.square().mean(tuple(range(-gamma.dim(), 0)), keepdim=True) + 1e-5).sqrt() * gamma


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("normalised", [(7,), (3, 7)])
def test_rms_norm(normalised: tuple[int, ...], dtype: torch.dtype, npu: torch.device) -> None:
    inputs = {"x": randn(2, 5, 3, 7), "gamma": randn(*normalised)}

    def operator(x, gamma):
        return torch_npu.npu_rms_norm(x, gamma, 1e-5)[0]

    check_operator(operator, exact_rms_norm, inputs, dtype, npu)


def test_rms_norm_with_float32_gamma(npu: torch.device) -> None:
    inputs = {"x": randn(2, 5, 7), "gamma": randn(7)}

    def operator(x, gamma):
        return torch_npu.npu_rms_norm(x, gamma, 1e-5)[0]

    check_operator(operator, exact_rms_norm, inputs, torch.bfloat16, npu, keep=("gamma",))


def test_rms_norm_rounds_once_and_gives_float32_statistics(npu: torch.device) -> None:
    x, gamma = randn(3, 64).bfloat16(), randn(64).bfloat16()
    y, rstd = torch_npu.npu_rms_norm(x.to(npu), gamma.to(npu), 1e-5)
    assert (rstd.dtype, rstd.shape) == (torch.float32, (3, 1))
    once = exact_rms_norm(x.double(), gamma.double()).bfloat16()
    twice = exact_rms_norm(x.double(), torch.ones(64).double()).bfloat16() * gamma
    assert torch.equal(y.cpu(), once)
    assert not torch.equal(once, twice)
    dgamma = torch_npu.npu_rms_norm_backward(x.to(npu), x.to(npu), gamma.to(npu), rstd)[1]
    assert dgamma.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemma_rms_norm(dtype: torch.dtype, npu: torch.device) -> None:
    x, gamma = randn(3, 7).to(dtype), randn(7).to(dtype)
    y = torch_npu.npu_gemma_rms_norm(x.to(npu), gamma.to(npu), 1e-5)[0]
    expect_close(y, exact_rms_norm(x.double(), 1 + gamma.double()), dtype)


def test_add_rms_norm_rounds_twice(npu: torch.device) -> None:
    x1, x2, gamma = randn(3, 64).bfloat16(), randn(3, 64, seed=1).bfloat16(), randn(64).bfloat16()
    y, _, total = torch_npu.npu_add_rms_norm(x1.to(npu), x2.to(npu), gamma.to(npu), 1e-5)
    exact = x1.double() + x2.double()
    assert torch.equal(total.cpu(), exact.bfloat16())
    normalised = exact_rms_norm(exact, torch.ones(64).double()).bfloat16()
    assert torch.equal(y.cpu(), normalised * gamma)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, 1])
def test_swiglu(dim: int, dtype: torch.dtype, npu: torch.device) -> None:
    def formula(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim)
        return a / (1 + (-a).exp()) * b

    check_operator(lambda x: torch_npu.npu_swiglu(x, dim), formula, {"x": randn(3, 4, 10)}, dtype, npu)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("approximate", [0, 1])
def test_geglu(approximate: int, left: bool, dtype: torch.dtype, npu: torch.device) -> None:
    def formula(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1) if left else reversed(x.chunk(2, -1))
        return F.gelu(a, approximate="tanh" if approximate else "none") * b

    def operator(x):
        return torch_npu.npu_geglu(x, -1, approximate, left)[0]

    check_operator(operator, formula, {"x": randn(3, 10)}, dtype, npu)


# ---- rotary ----


def rotated(x: Tensor, mode: str) -> Tensor:
    half = x.shape[-1] // 2
    result = torch.empty_like(x)
    for i in range(half):
        first, second = (i, i + half) if mode == "half" else (2 * i, 2 * i + 1)
        result[..., first], result[..., second] = -x[..., second], x[..., first]
    return result


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("x", "cos", "mode"),
    [
        ((2, 3, 9, 32), (1, 1, 9, 32), "half"),
        ((2, 3, 9, 12), (2, 1, 9, 12), "half"),
        ((2, 3, 9, 12), (2, 3, 9, 12), "half"),
        ((2, 9, 3, 12), (1, 9, 1, 12), "half"),
        ((2, 9, 3, 12), (2, 9, 1, 12), "half"),
        ((9, 2, 3, 12), (9, 1, 1, 12), "half"),
        ((9, 3, 12), (9, 1, 12), "half"),
        ((2, 3, 9, 12), (1, 1, 9, 12), "interleave"),
    ],
)
def test_rotary_mul(x: tuple[int, ...], cos: tuple[int, ...], mode: str, dtype: torch.dtype, npu: torch.device) -> None:
    inputs = {"x": randn(*x), "cos": randn(*cos), "sin": randn(*cos, seed=1)}
    check_operator(
        lambda x, cos, sin: torch_npu.npu_rotary_mul(x, cos, sin, mode),
        lambda x, cos, sin: x * cos + rotated(x, mode) * sin,
        inputs,
        dtype,
        npu,
    )


def test_rotary_mul_rounds_cos_and_sin_to_the_dtype_of_x(npu: torch.device) -> None:
    x, cos, sin = randn(1, 2, 9, 32).bfloat16(), randn(1, 1, 9, 32).float(), randn(1, 1, 9, 32, seed=1).float()
    y = torch_npu.npu_rotary_mul(x.to(npu), cos.to(npu), sin.to(npu))
    exact = x.double() * cos.bfloat16().double() + rotated(x.double(), "half") * sin.bfloat16().double()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.cpu(), exact.bfloat16())


def test_rotary_gradients_of_cos_are_unwritten_unless_needed(npu: torch.device) -> None:
    x, cos = torch.ones(1, 2, 9, 32, device=npu), torch.ones(1, 1, 9, 32, device=npu)
    dx, dcos, dsin = torch_npu.npu_rotary_mul_backward(x, x, cos, cos)
    assert not dx.isnan().any()
    assert dcos.isnan().all()
    assert dsin.isnan().all()


# ---- grouped products and permutation ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("counts", [True, False])
def test_grouped_matmul_rows(counts: bool, transposed: bool, dtype: torch.dtype, npu: torch.device) -> None:
    x, weight = randn(9, 5).to(dtype), randn(3, 5, 4).to(dtype)
    given = weight.mT.contiguous().to(npu).mT if transposed else weight.to(npu)
    groups = torch.tensor([2, 0, 4] if counts else [2, 2, 6], device=npu)
    (y,) = torch_npu.npu_grouped_matmul(
        [x.to(npu)], [given], group_list=groups, split_item=3, group_type=0, group_list_type=int(counts)
    )
    expected = torch.cat([x[:2].double() @ weight[0].double(), x[2:6].double() @ weight[2].double()])
    expect_close(y[:6], expected, dtype)
    assert y[6:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul_columns(dtype: torch.dtype, npu: torch.device) -> None:
    x, dy = randn(9, 5).to(dtype), randn(9, 4).to(dtype)
    groups = torch.tensor([2, 0, 4], device=npu)
    (dw,) = torch_npu.npu_grouped_matmul(
        [x.to(npu).t()], [dy.to(npu)], group_list=groups, split_item=3, group_type=2, group_list_type=1
    )
    assert dw.shape == (3, 5, 4)
    expect_close(dw[0], x[:2].double().T @ dy[:2].double(), dtype)
    expect_close(dw[2], x[2:6].double().T @ dy[2:6].double(), dtype)
    assert (dw[1] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_permutation_and_back(dtype: torch.dtype, npu: torch.device) -> None:
    indices = torch.tensor([[2, 0], [0, 1], [3, 0], [1, 3], [3, 2]])

    def operator(tokens: Tensor, probs: Tensor) -> Tensor:
        permuted, where = torch_npu.npu_moe_token_permute(tokens, indices.to(npu))
        assert where.dtype == torch.int32
        return torch_npu.npu_moe_token_unpermute(permuted * permuted, where, probs)

    def formula(tokens: Tensor, probs: Tensor) -> Tensor:
        return (tokens[:, None] ** 2 * probs[..., None]).sum(1)

    check_operator(operator, formula, {"tokens": randn(5, 3), "probs": randn(5, 2)}, dtype, npu)


def test_permuted_rows_are_sorted_by_expert(npu: torch.device) -> None:
    tokens = torch.arange(4.0)[:, None].to(npu)
    indices = torch.tensor([[1, 0], [0, 1], [2, 1], [0, 2]], device=npu)
    permuted, where = torch_npu.npu_moe_token_permute(tokens, indices)
    assert permuted.flatten().tolist() == [0, 1, 3, 0, 1, 2, 2, 3]
    assert where.tolist() == [3, 0, 1, 4, 6, 5, 2, 7]
    kept, where_kept = torch_npu.npu_moe_token_permute(tokens, indices, num_out_tokens=-3)
    assert kept.flatten().tolist() == [0, 1, 3, 0, 1]
    assert torch.equal(where, where_kept)
    unreduced = torch_npu.npu_moe_token_unpermute(permuted, where)
    assert unreduced.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- dropout ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_scales_what_its_mask_keeps(dtype: torch.dtype, npu: torch.device) -> None:
    """The gradient by the same mask: bits from the lowest of a byte on, in multiples of 128."""
    x = torch.randn(7, 45, generator=torch.Generator().manual_seed(0)).to(npu, dtype).requires_grad_()
    y, mask = torch.ops.npu._npu_dropout(x, 0.25)
    assert (mask.dtype, mask.shape) == (torch.uint8, (3 * 16,))
    kept = torch.tensor([(byte >> bit) & 1 for byte in mask.tolist() for bit in range(8)][: 7 * 45]).view(7, 45)
    assert 0.65 < kept.float().mean() < 0.85
    expect_close(y, x.detach().cpu().double() * kept / 0.75, dtype)
    grad = torch.randn(7, 45, generator=torch.Generator().manual_seed(1)).to(dtype)
    y.backward(grad.to(npu))
    expect_close(x.grad, grad.double() * kept / 0.75, dtype)


# ---- operators without a derivative ----


MISSING_DERIVATIVE = """
from npu_patch import simulator
simulator.start()
import torch, torch_npu
x = torch.ones(4, 5, device="npu", requires_grad=True)
weight = torch.ones(2, 5, 3, device="npu", requires_grad=True)
groups = torch.tensor([1, 3], device="npu")
(y,) = torch_npu.npu_grouped_matmul(
    [x], [weight], group_list=groups, split_item=3, group_type=0, group_list_type=1
)
y.sum().backward()
print(x.grad, weight.grad)
"""


def test_a_missing_derivative_warns_and_gives_no_gradient() -> None:
    """In a process of its own: torch_npu warns once, in C++, straight to stderr."""
    done = python("-c", MISSING_DERIVATIVE)
    assert done.returncode == 0, done.stderr
    assert "npu::npu_grouped_matmul: an autograd kernel was not registered" in done.stderr
    assert "None None" in done.stdout


@needs_autograd_kernel("npu_add_rms_norm")
def test_a_documented_missing_derivative_raises(npu: torch.device) -> None:
    x, gamma = torch.ones(4, 5, device=npu, requires_grad=True), torch.ones(5, device=npu)
    y: Any = torch_npu.npu_add_rms_norm(x, x, gamma)[0]
    with pytest.raises(RuntimeError, match=r"derivative for '?npu::npu_add_rms_norm'? is not implemented"):
        y.sum().backward()


def test_an_operator_that_is_not_emulated_fails_by_name(npu: torch.device) -> None:
    with pytest.raises(RuntimeError, match=r"aclnnDynamicQuantAsymmetric|npu_dynamic_quant_asymmetric"):
        torch_npu.npu_dynamic_quant_asymmetric(torch.ones(3, 4, device=npu, dtype=torch.float16))
