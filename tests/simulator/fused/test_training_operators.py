"""Operators that training scripts meet beside the fused ones: against plain formulas, forward and backward; and what
their documentation does not allow is refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu
from torch import Tensor
from torch.nn import functional

from npu_patch.simulator import Refused

from .test_fused import DTYPES, check_operator, expect_close, randn

pytestmark = pytest.mark.usefixtures("simulated")

F32 = torch.float32


def npu(tensor: Tensor) -> Tensor:
    return tensor.to("npu")


# ---- cross entropy ----

TARGET = torch.tensor([3, 0, 6, 3, 1])
WEIGHT = torch.tensor([0.5, 1.0, 0.25, 0.75, 1.0, 0.1, 0.9])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_and_its_gradient(reduction: str, dtype: torch.dtype, npu: torch.device) -> None:
    weighted = {} if reduction == "mean" else {"weight": WEIGHT, "ignore_index": 1}

    def operator(input: Tensor) -> Tensor:
        options = {name: value.to(npu) if isinstance(value, Tensor) else value for name, value in weighted.items()}
        loss, log_prob, zloss, lse = torch_npu.npu_cross_entropy_loss(
            input, TARGET.to(npu), reduction=reduction, **options
        )
        assert log_prob.shape == input.shape and zloss.numel() == lse.numel() == 0
        assert loss.shape == ((5,) if reduction == "none" else (1,))
        return loss

    def formula(input: Tensor) -> Tensor:
        options = dict(weighted, weight=WEIGHT.double()) if weighted else {}
        return functional.cross_entropy(input, TARGET, reduction=reduction, **options).reshape(-1)

    check_operator(operator, formula, {"input": randn(5, 7)}, dtype, npu)


def test_cross_entropy_with_label_smoothing() -> None:
    input = randn(5, 7).float()
    loss = torch_npu.npu_cross_entropy_loss(npu(input), npu(TARGET), npu(WEIGHT), label_smoothing=0.3)[0]
    expected = functional.cross_entropy(input, TARGET, WEIGHT, label_smoothing=0.3).reshape(1)
    torch.testing.assert_close(loss.cpu(), expected)


def cross_entropy(target: Tensor = TARGET, backward: bool = False, **options: Any) -> None:
    input = npu(randn(5, 7).float()).requires_grad_(backward)
    loss = torch_npu.npu_cross_entropy_loss(input, npu(target), **options)[0]
    if backward:
        loss.sum().backward()


# ---- softmax ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_masked_softmax(dtype: torch.dtype, npu: torch.device) -> None:
    mask = torch.rand(2, 1, 32, 64, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[0, 0, 3] = True
    check_operator(
        lambda x: torch_npu.npu_scaled_masked_softmax(x, mask.to(npu), 0.5, False),
        lambda x: (x * 0.5).masked_fill(mask, -10000.0).softmax(-1),
        {"x": randn(2, 3, 32, 64)},
        dtype,
        npu,
    )


@pytest.mark.parametrize("name", ["_softmax", "_log_softmax"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_softmax_of_a_half_with_a_float_result(dtype: torch.dtype, name: str) -> None:
    x, grad = randn(3, 5).to(dtype), randn(3, 5, seed=1).float()
    exact = x.double().requires_grad_()
    expected = exact.softmax(-1) if name == "_softmax" else exact.log_softmax(-1)
    expected.backward(grad.double())
    given = npu(x).requires_grad_()
    actual = getattr(torch, name)(given, -1, True)
    assert actual.dtype == F32
    expect_close(actual, expected, F32)
    actual.backward(npu(grad))
    assert given.grad.dtype == dtype
    expect_close(given.grad, exact.grad, dtype)


def test_softmax_of_a_float_cannot_be_widened() -> None:
    with pytest.raises(RuntimeError, match="conversion is supported for Half"):
        torch._softmax(npu(torch.ones(2, 3)), -1, True)


# ---- experts ----


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gating(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = randn(*shape).to(dtype)
    finished = torch.zeros(shape[:-1], dtype=torch.bool)
    finished.view(-1)[4] = True
    y, experts, rows = torch_npu.npu_moe_gating_top_k_softmax(npu(x), npu(finished), 2)
    values, indices = x.float().softmax(-1).topk(2)
    assert y.dtype == dtype and experts.dtype == rows.dtype == torch.int32
    torch.testing.assert_close(y.cpu(), values.to(dtype))
    assert torch.equal(experts.cpu(), indices.int().masked_fill(finished[..., None], 5))
    assert rows.cpu().view(6, 2).tolist() == [[i, i + 6] for i in range(6)]


@pytest.mark.parametrize("renorm", [0, 1])
def test_gating_that_normalises_again(renorm: int) -> None:
    x = randn(6, 5).float()
    y, experts, whole = torch_npu.npu_moe_gating_top_k_softmax_v2(npu(x), k=2, renorm=renorm, output_softmax=True)
    softmax = x.softmax(-1)
    values, indices = softmax.topk(2)
    expected = values / values.sum(-1, keepdim=True) if renorm else values
    torch.testing.assert_close(y.cpu(), expected)
    assert torch.equal(experts.cpu(), indices.int())
    torch.testing.assert_close(whole.cpu(), torch.empty(0) if renorm else softmax)


def test_gating_has_no_gradient() -> None:
    y = torch_npu.npu_moe_gating_top_k_softmax(npu(torch.ones(2, 3)).requires_grad_(), None, 2)[0]
    with pytest.raises(RuntimeError, match="npu_moe_gating_top_k_softmax is not implemented"):
        y.sum().backward()


@pytest.mark.parametrize("active", [3, 4, 9])
def test_init_routing_sorts_rows_by_expert(active: int) -> None:
    x = randn(4, 3).float()
    experts = torch.tensor([[2, 0], [1, 2], [0, 1], [2, 1]], dtype=torch.int32)
    rows = torch.arange(8, dtype=torch.int32).view(2, 4).t().contiguous()
    expanded, where, sorted_experts = torch_npu.npu_moe_init_routing(npu(x), npu(rows), npu(experts), active)
    assert sorted_experts.tolist() == sorted(experts.flatten().tolist())
    kept = min(active, 4) * 2
    assert expanded.shape == (kept, 3)
    for token in range(4):
        for choice in range(2):
            row = where[rows[token, choice].item()].item()
            assert sorted_experts[row].item() == experts[token, choice].item()
            if row < kept:
                assert torch.equal(expanded[row].cpu(), x[token])


MAP = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=torch.bool)


def permuted_by_formula(tokens: Tensor, probs: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    """Rows and their probs, expert after expert; `capacity`: that many for each, the chosen ones first."""
    rows, weights = [], []
    for expert in range(MAP.shape[1]):
        chosen = MAP[:, expert].nonzero().flatten().tolist()
        if capacity is not None:
            chosen = (chosen + [token for token in range(len(MAP)) if token not in chosen])[:capacity]
        rows += [tokens[token] for token in chosen]
        weights += [probs[token, expert] for token in chosen]
    return torch.stack(rows), torch.stack(weights)


@pytest.mark.parametrize("capacity", [None, 2, 3, 4])
@pytest.mark.parametrize("as_int", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permutation_by_a_routing_map(
    dtype: torch.dtype, as_int: bool, capacity: int | None, npu: torch.device
) -> None:
    given_map = (MAP.to(torch.int8) if as_int else MAP).to(npu)

    def operator(tokens: Tensor, probs: Tensor) -> Tensor:
        rows = 8 if capacity is None else 3 * capacity
        permuted, permuted_probs, where = torch_npu.npu_moe_token_permute_with_routing_map(
            tokens, given_map, probs=probs, num_out_tokens=rows, drop_and_pad=capacity is not None
        )
        assert permuted.shape == (rows, 5) and where.dtype == torch.int32
        return permuted * permuted_probs[:, None]

    def formula(tokens: Tensor, probs: Tensor) -> Tensor:
        rows, weights = permuted_by_formula(tokens, probs, capacity)
        return rows * weights[:, None]

    check_operator(operator, formula, {"tokens": randn(4, 5), "probs": randn(4, 3)}, dtype, npu)


@pytest.mark.parametrize("capacity", [None, 2, 4])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_permutation_by_a_routing_map_and_back(
    dtype: torch.dtype, weighted: bool, capacity: int | None, npu: torch.device
) -> None:
    given_map = MAP.to(npu)
    padded = capacity is not None

    def operator(tokens: Tensor, probs: Tensor) -> Tensor:
        permuted, nothing, where = torch_npu.npu_moe_token_permute_with_routing_map(
            tokens, given_map, num_out_tokens=3 * capacity if padded else 8, drop_and_pad=padded
        )
        assert nothing is None
        out = torch_npu.npu_moe_token_unpermute_with_routing_map(
            permuted * permuted, where, [4, 5], probs=probs if weighted else None, routing_map=given_map,
            drop_and_pad=padded,
        )  # fmt: skip
        return out if weighted else out + 0 * probs.sum()

    def formula(tokens: Tensor, probs: Tensor) -> Tensor:
        numbers = torch.arange(4).double()[:, None]
        rows, weights = permuted_by_formula(tokens, probs, capacity)
        sources = permuted_by_formula(numbers, probs.detach(), capacity)[0].flatten().long()
        if not weighted:
            weights = torch.ones_like(weights) + 0 * probs.sum()
        return torch.zeros(4, 5, dtype=torch.float64).index_add(0, sources, rows * rows * weights[:, None])

    check_operator(operator, formula, {"tokens": randn(4, 5), "probs": randn(4, 3)}, dtype, npu)


@torch.inference_mode()
def test_rows_come_back_by_a_routing_map_without_gradients() -> None:
    tokens, given_map = npu(randn(4, 5).float()), npu(MAP)
    permuted, _, where = torch_npu.npu_moe_token_permute_with_routing_map(tokens, given_map, num_out_tokens=8)
    back = torch_npu.npu_moe_token_unpermute_with_routing_map(permuted, where, [4, 5], routing_map=given_map)
    torch.testing.assert_close(back, 2 * tokens)


# ---- rotary in place, group norm, transposes, AdamW ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_rotary_in_place(layout: str, dtype: torch.dtype) -> None:
    rows = (2, 3) if layout == "BSND" else (6,)
    query, key = (randn(*rows, heads, 64, seed=heads).to(dtype) for heads in (4, 2))
    cos, sin = (randn(*rows, 1, 64, seed=seed).to(dtype) for seed in (7, 8))
    given = [npu(tensor) for tensor in (query, key)]
    results = torch_npu.npu_apply_rotary_pos_emb(*given, npu(cos), npu(sin), layout, "half")
    for x, changed, result in zip((query, key), given, results, strict=True):
        first, second = x.double().chunk(2, -1)
        expected = x.double() * cos.double() + torch.cat((-second, first), -1) * sin.double()
        expect_close(changed, expected, dtype)
        assert result.data_ptr() == changed.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 3, 4)])
def test_group_norm_silu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight, bias = randn(*shape).to(dtype), randn(6).float(), randn(6, seed=1).float()
    out, mean, rstd = torch_npu.npu_group_norm_silu(npu(x), npu(weight), npu(bias), 3, 1e-3)
    expected = functional.silu(functional.group_norm(x.double(), 3, weight.double(), bias.double(), 1e-3))
    grouped = x.double().reshape(shape[0], 3, -1)
    assert out.dtype == mean.dtype == rstd.dtype == dtype
    expect_close(out, expected, dtype)
    expect_close(mean, grouped.mean(-1), dtype)
    expect_close(rstd, (grouped.var(-1, correction=0) + 1e-3).rsqrt(), dtype)
    plain = torch_npu.npu_group_norm_silu(npu(x), None, None, 3, 1e-3)[0]
    expect_close(plain, functional.silu(functional.group_norm(x.double(), 3, eps=1e-3)), dtype)


@pytest.mark.parametrize("transpose_first", [True, False])
def test_confusion_transpose(transpose_first: bool, npu: torch.device) -> None:
    perm, shape = ((2, 0, 1, 3), (4, 12)) if transpose_first else ((1, 2, 0), (6, 4, 2))
    check_operator(
        lambda input: torch_npu.npu_confusion_transpose(input, perm, shape, transpose_first),
        lambda input: input.permute(perm).reshape(shape) if transpose_first else input.reshape(shape).permute(perm),
        {"input": randn(2, 3, 4, 2)},
        F32,
        npu,
    )


@pytest.mark.parametrize("maximize", [False, True])
def test_adam_w_takes_torch_s_steps(maximize: bool) -> None:
    start, grads = randn(7, 3).float(), [randn(7, 3, seed=seed).float() for seed in range(3)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([parameter], 0.1, (0.8, 0.95), 1e-6, weight_decay=0.2, maximize=maximize)
    state = [npu(start), npu(torch.zeros(7, 3)), npu(torch.zeros(7, 3))]
    for step, grad in enumerate(grads):
        parameter.grad = grad.clone()
        optimizer.step()
        results = torch_npu.npu_apply_adam_w(
            0.8**step, 0.95**step, 0.1, 0.2, 0.8, 0.95, 1e-6, npu(grad), None, False, maximize, out=state
        )
        assert [result.data_ptr() for result in results] == [tensor.data_ptr() for tensor in state]
    torch.testing.assert_close(state[0].cpu(), parameter.detach())


@pytest.mark.parametrize("acl_format", [0, 2, 3, 29, 30])
def test_a_format_cast_keeps_the_values(acl_format: int) -> None:
    x = randn(33, 47).float()
    given = npu(x).requires_grad_()
    cast = torch_npu.npu_format_cast(given, acl_format)
    assert torch.equal(cast.detach().cpu(), x)
    cast.sum().backward()
    assert torch.equal(given.grad.cpu(), torch.ones(33, 47))
    assert torch.equal(torch_npu.npu_format_cast_(npu(x), acl_format).cpu(), x)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_one_hot_keeps_the_integer_dtype(dtype: torch.dtype) -> None:
    hot = functional.one_hot(npu(torch.tensor([2, 0], dtype=dtype)), 4)
    assert hot.dtype == dtype and hot.tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]


# ---- recurrent layers and renorm ----


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU, torch.nn.RNN])
def test_recurrent_layers(kind: type[torch.nn.Module], bidirectional: bool, packed: bool) -> None:
    torch.manual_seed(0)
    layer = kind(4, 3, num_layers=2, bidirectional=bidirectional, batch_first=True).double()
    moved = copy.deepcopy(layer).float().to("npu")
    x = randn(3, 5, 4)
    grads = []
    for module, source in ((layer, x), (moved, npu(x.float()))):
        source = source.clone().requires_grad_()
        given = source
        if packed:
            given = torch.nn.utils.rnn.pack_padded_sequence(source, torch.tensor([5, 3, 2]), batch_first=True)
        out, state = module(given)
        last = state[1] if kind is torch.nn.LSTM else state
        values = out.data if packed else out
        (values.square().sum() + last.square().sum()).backward()
        grads.append([values, last, source.grad, *(parameter.grad for parameter in module.parameters())])
    for exact, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), exact.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.nn.LSTMCell, torch.nn.GRUCell])
@pytest.mark.parametrize("bias", [True, False])
def test_recurrent_cells(bias: bool, kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    layer = kind(4, 3, bias=bias).double()
    moved = copy.deepcopy(layer).float().to("npu")
    x, grads = randn(5, 4), []
    for module, source in ((layer, x), (moved, npu(x.float()))):
        out = module(source)
        out = torch.cat(out) if kind is torch.nn.LSTMCell else out
        out.square().sum().backward()
        grads.append([out, *(parameter.grad for parameter in module.parameters())])
    for exact, ours in zip(*grads, strict=True):
        torch.testing.assert_close(ours.detach().cpu().double(), exact.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0, float("inf")])
def test_renorm(p: float, npu: torch.device) -> None:
    check_operator(lambda x: x.renorm(p, 1, 1.5), lambda x: x.renorm(p, 1, 1.5), {"x": randn(4, 5, 3)}, F32, npu)


# ---- refusals ----


def ones(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.ones(*shape, dtype=dtype, device="npu")


def permute(routing_map: Tensor, **options: Any) -> Any:
    return torch_npu.npu_moe_token_permute_with_routing_map(ones(4, 5), npu(routing_map), **options)


def unpermute(**options: Any) -> Any:
    where = torch.arange(8, dtype=torch.int32, device="npu")
    return torch_npu.npu_moe_token_unpermute_with_routing_map(ones(8, 5), where, [4, 5], **options)


def rotate(layout: str = "BSND", mode: str = "half", width: int = 64, tables: tuple[int, ...] = (2, 3, 1)) -> Any:
    table = ones(*tables, width)
    return torch_npu.npu_apply_rotary_pos_emb(ones(2, 3, 4, width), ones(2, 3, 2, width), table, table, layout, mode)


def norm(shape: tuple[int, ...] = (2, 6, 5), weight: Tensor | None = None, group: int = 3, eps: float = 1e-5) -> Any:
    return torch_npu.npu_group_norm_silu(ones(*shape, dtype=torch.bfloat16), weight, None, group, eps)


def softmax(shape: tuple[int, ...] = (1, 1, 32, 32), mask: tuple[int, ...] = (32, 32), fixed: bool = False) -> Any:
    return torch_npu.npu_scaled_masked_softmax(ones(*shape), ones(*mask, dtype=torch.bool), 1.0, fixed)


def adam_w(amsgrad: bool = False, **some: Any) -> Any:
    tensors = {"var": ones(3), "m": ones(3), "v": ones(3), "grad": ones(3)} | some
    out = [tensors[name] for name in ("var", "m", "v")]
    return torch_npu.npu_apply_adam_w(
        0.9, 0.9, 0.1, 0.1, 0.9, 0.9, 1e-8, tensors["grad"], None, amsgrad, False, out=out
    )


def route(dtype: torch.dtype = torch.int32, rows: tuple[int, ...] = (0, 2, 1, 3)) -> Any:
    row_idx = torch.tensor(rows, dtype=torch.int32, device="npu").view(2, 2)
    return torch_npu.npu_moe_init_routing(ones(2, 3), row_idx, ones(2, 2, dtype=dtype), 2)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "cross entropy: -100": (lambda: cross_entropy(torch.tensor([3, -100, 6, 3, 1])), "target must be in [0, 7)"),
    "cross entropy: too large": (lambda: cross_entropy(torch.tensor([3, 7, 6, 3, 1])), "not [7]"),
    "cross entropy: int32": (lambda: cross_entropy(TARGET.int()), "dtype of target must be one of int64"),
    "cross entropy: shape": (lambda: cross_entropy(TARGET[:4]), "target must be [N] = [5]"),
    "cross entropy: reduction": (lambda: cross_entropy(reduction="max"), "mean, sum or none"),
    "cross entropy: zloss": (lambda: cross_entropy(return_zloss=True), "zloss"),
    "cross entropy: ignore_index": (lambda: cross_entropy(ignore_index=7), "below C=7"),
    "cross entropy: smoothing": (lambda: cross_entropy(label_smoothing=1.0), "[0, 1)"),
    "cross entropy: half weight": (lambda: cross_entropy(weight=npu(WEIGHT.half())), "dtype of weight"),
    "cross entropy: smoothing backward": (lambda: cross_entropy(backward=True, label_smoothing=0.1), "must be 0"),
    "cross entropy: mean backward": (lambda: cross_entropy(backward=True, ignore_index=3), "must be left out"),
    "softmax: fixed mask": (lambda: softmax(fixed=True), "must be False"),
    "softmax: W": (lambda: softmax((1, 1, 32, 40), (32, 40)), "multiples of 32"),
    "softmax: 3-D": (lambda: softmax((1, 32, 32)), "[N, C, H, W]"),
    "softmax: mask": (lambda: softmax(mask=(2, 1, 32, 32)), "must broadcast"),
    "gating: k": (lambda: torch_npu.npu_moe_gating_top_k_softmax(ones(3, 4), None, 5), "k must be 0 to 4"),
    "gating: finished": (
        lambda: torch_npu.npu_moe_gating_top_k_softmax(ones(3, 4), ones(2, dtype=torch.bool), 1),
        "finished must be [3]",
    ),
    "gating: renorm": (lambda: torch_npu.npu_moe_gating_top_k_softmax_v2(ones(3, 4), renorm=2), "renorm"),
    "init routing: int64": (lambda: route(torch.int64), "dtype of expert_idx"),
    "init routing: rows": (lambda: route(rows=(0, 2, 1, 2)), "each of 0 to N * K - 1 once"),
    "routing map: uneven": (lambda: permute(MAP, num_out_tokens=4), "4 / 4 = 1 experts"),
    "routing map: int64": (lambda: permute(MAP.long()), "dtype of routing_map"),
    "routing map: tokens": (lambda: permute(MAP[:3]), "N=4"),
    "routing map: probs": (lambda: permute(MAP, num_out_tokens=8, probs=ones(4, 2)), "probs must be [N, E]"),
    "routing map: capacity": (lambda: permute(MAP, num_out_tokens=15, drop_and_pad=True), "more than the 4 tokens"),
    "routing map: no map": (lambda: unpermute(probs=ones(4, 3)), "probs need routing_map"),
    "rotary: BNSD": (lambda: rotate("BNSD"), "layout must be BSND or TND"),
    "rotary: interleave": (lambda: rotate(mode="interleave"), "must be half"),
    "rotary: D": (lambda: rotate(width=32), "64 or 128"),
    "rotary: broadcast": (lambda: rotate(tables=(1, 3, 1)), "cos must be [2, 3, 1, 64]"),
    "group norm: groups": (lambda: norm(group=4), "must divide 6"),
    "group norm: eps": (lambda: norm(eps=0.0), "above 0"),
    "group norm: weight": (lambda: norm(weight=ones(6, dtype=torch.float16)), "dtype of weight"),
    "group norm: channels": (lambda: norm(weight=ones(5)), "weight must be [6]"),
    "AdamW: amsgrad": (lambda: adam_w(amsgrad=True), "amsgrad must be False"),
    "AdamW: dtype": (lambda: adam_w(grad=ones(3, dtype=torch.bfloat16)), "equal"),
    "AdamW: shape": (lambda: adam_w(m=ones(4)), "m must be [3]"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str) -> None:
    call, words = REFUSED[case]
    with pytest.raises(Refused) as refusal:
        call()
    assert words in str(refusal.value)
