"""What the operators' documentation does not allow is refused, with the operator's name and the broken rule."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_npu

from npu_patch.simulator import Refused

pytestmark = pytest.mark.usefixtures("simulated")

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def ones(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.ones(*shape, dtype=dtype, device="npu:0")


def norm(x: torch.Tensor, gamma: torch.Tensor) -> Any:
    return torch_npu.npu_rms_norm(x, gamma)


def rope(x: tuple[int, ...], cos: tuple[int, ...], mode: str = "half", dtype: torch.dtype = F32) -> Any:
    return torch_npu.npu_rotary_mul(ones(*x, dtype=dtype), ones(*cos), ones(*cos), mode)


def rope_backward(x: tuple[int, ...], cos: tuple[int, ...]) -> Any:
    r = ones(*cos).requires_grad_()
    return torch_npu.npu_rotary_mul(ones(*x).requires_grad_(), r, r).sum().backward()


def attend(
    q: tuple[int, ...] = (2, 4, 5, 8),
    k: tuple[int, ...] = (2, 2, 7, 8),
    heads: int = 4,
    layout: str = "BNSD",
    **some: Any,
) -> Any:  # fmt: skip
    return torch_npu.npu_fusion_attention(ones(*q), ones(*k), ones(*k), heads, layout, **some)


def mask(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bool, device="npu:0")


def triangle() -> torch.Tensor:
    return torch.ones(2048, 2048, dtype=torch.bool, device="npu:0").triu(1)


def packed(queries: list[int], keys: list[int], **some: Any) -> Any:
    return attend(q=(9, 4, 8), k=(9, 2, 8), layout="TND", actual_seq_qlen=queries, actual_seq_kvlen=keys, **some)


def gmm(
    x: torch.Tensor | None = None, weight: torch.Tensor | None = None, groups: Any = (1, 3), kind: Any = 0, **some: Any
) -> Any:
    x = ones(4, 5) if x is None else x
    weight = ones(2, 5, 3) if weight is None else weight
    groups = torch.tensor(groups, device="npu:0") if isinstance(groups, tuple) else groups
    arguments = {"split_item": 3, "group_list_type": 1, **some}
    return torch_npu.npu_grouped_matmul([x], [weight], group_list=groups, group_type=kind, **arguments)


def permute(tokens: torch.Tensor, indices: torch.Tensor, **some: Any) -> Any:
    return torch_npu.npu_moe_token_permute(tokens, indices, **some)


# operator, what is wrong, call, words of the message
CASES: list[tuple[str, str, Callable[[], Any], str]] = [
    ("npu_rms_norm", "half gamma", lambda: norm(ones(3, 8), ones(8, dtype=BF16)), "gamma must have the dtype"),
    ("npu_rms_norm", "float16 with bfloat16", lambda: norm(ones(3, 8, dtype=F16), ones(8, dtype=BF16)), "gamma must"),
    ("npu_rms_norm", "float64", lambda: norm(ones(3, 8, dtype=torch.float64), ones(8)), "dtype of input"),
    ("npu_rms_norm", "gamma not trailing", lambda: norm(ones(3, 8), ones(3)), "trailing dimensions"),
    ("npu_rms_norm", "gamma on the CPU", lambda: norm(ones(3, 8), torch.ones(8)), "same device"),
    ("npu_gemma_rms_norm", "mixed", lambda: torch_npu.npu_gemma_rms_norm(ones(3, 8, dtype=BF16), ones(8)), "equal"),
    ("npu_gemma_rms_norm", "strided", lambda: torch_npu.npu_gemma_rms_norm(ones(8, 3).t(), ones(8)), "contiguous"),
    ("npu_gemma_rms_norm", "empty", lambda: torch_npu.npu_gemma_rms_norm(ones(0, 8), ones(8)), "empty"),
    ("npu_add_rms_norm", "shapes", lambda: torch_npu.npu_add_rms_norm(ones(3, 8), ones(1, 8), ones(8)), "one shape"),
    ("npu_swiglu", "odd", lambda: torch_npu.npu_swiglu(ones(3, 7)), "even"),
    ("npu_swiglu", "strided", lambda: torch_npu.npu_swiglu(ones(8, 4).t()), "contiguous"),
    ("npu_swiglu", "empty", lambda: torch_npu.npu_swiglu(ones(0, 8)), "empty"),
    ("npu_swiglu", "integers", lambda: torch_npu.npu_swiglu(ones(2, 8, dtype=torch.int32)), "dtype"),
    ("npu_geglu", "approximate", lambda: torch_npu.npu_geglu(ones(2, 8), -1, 2), "approximate"),
    ("npu_rotary_mul", "odd D", lambda: rope((2, 3, 9, 7), (1, 1, 9, 7)), "even"),
    ("npu_rotary_mul", "wide D", lambda: rope((2, 3, 9, 898), (1, 1, 9, 898)), "896"),
    ("npu_rotary_mul", "partial", lambda: rope((2, 3, 9, 32), (1, 1, 9, 16)), "last dimension"),
    ("npu_rotary_mul", "rank of cos", lambda: rope((2, 3, 9, 32), (9, 32)), "rank"),
    ("npu_rotary_mul", "1NSD", lambda: rope((2, 3, 9, 32), (1, 3, 9, 32)), "no supported layout"),
    ("npu_rotary_mul", "111D", lambda: rope((2, 3, 9, 32), (1, 1, 1, 32)), "no supported layout"),
    ("npu_rotary_mul", "block skip, aligned", lambda: rope((2, 37, 9, 32), (1, 1, 9, 32)), "B*N <= 8*S"),
    ("npu_rotary_mul", "block skip, unaligned", lambda: rope((2, 3, 440, 12), (1, 1, 440, 12)), "2*B*N <= ceil(S/40)"),
    ("npu_rotary_mul", "heads", lambda: rope((1, 1000, 2, 32), (1, 1, 2, 32)), "below 1000"),
    ("npu_rotary_mul", "interleave B1SD", lambda: rope((2, 3, 9, 32), (2, 1, 9, 32), "interleave"), "no supported"),
    ("npu_rotary_mul", "quarter", lambda: rope((2, 3, 9, 32), (1, 1, 9, 32), "quarter"), "rotary_mode"),
    ("npu_rotary_mul_backward", "BNSD, B >= S", lambda: rope_backward((3, 2, 3, 32), (3, 1, 3, 32)), "B < S"),
    ("npu_rotary_mul_backward", "B*N", lambda: rope_backward((2, 520, 140, 4), (2, 1, 140, 4)), "B*N <= 1024"),
    ("npu_fusion_attention", "head_num", lambda: attend(heads=2), "head_num"),
    ("npu_fusion_attention", "layout", lambda: attend(layout="BNDS"), "input_layout"),
    ("npu_fusion_attention", "GQA", lambda: attend(k=(2, 3, 7, 8)), "multiple"),
    ("npu_fusion_attention", "D", lambda: attend(k=(2, 2, 7, 6)), "one head dimension"),
    ("npu_fusion_attention", "wide D", lambda: attend(q=(1, 1, 2, 770), k=(1, 1, 2, 770), heads=1), "768"),
    ("npu_fusion_attention", "heads", lambda: attend(q=(1, 260, 2, 8), k=(1, 1, 2, 8), heads=260), "256"),
    ("npu_fusion_attention", "batch", lambda: attend(k=(1, 2, 7, 8)), "as many"),
    ("npu_fusion_attention", "keep_prob", lambda: attend(keep_prob=0.0), "keep_prob"),
    ("npu_fusion_attention", "float mask", lambda: attend(atten_mask=ones(5, 7)), "bool or uint8"),
    ("npu_fusion_attention", "[B,1,1,Skv]", lambda: attend(atten_mask=mask(2, 1, 1, 7)), "atten_mask must be"),
    ("npu_fusion_attention", "[1,N,Sq,Skv]", lambda: attend(atten_mask=mask(1, 4, 5, 7)), "atten_mask must be"),
    ("npu_fusion_attention", "3-D mask", lambda: attend(atten_mask=mask(2, 5, 7)), "atten_mask must be"),
    ("npu_fusion_attention", "causal, full mask", lambda: attend(atten_mask=mask(5, 7), sparse_mode=2), "[2048, 2048]"),
    ("npu_fusion_attention", "upside down", lambda: attend(atten_mask=~triangle(), sparse_mode=3), "triu(1)"),
    ("npu_fusion_attention", "band", lambda: attend(atten_mask=mask(5, 7), next_tockens=0), "does not hide"),
    ("npu_fusion_attention", "prefix", lambda: attend(atten_mask=triangle(), sparse_mode=6), "not simulated"),
    ("npu_fusion_attention", "sparse_mode", lambda: attend(sparse_mode=9), "0 to 8"),
    ("npu_fusion_attention", "pse", lambda: attend(pse=ones(5, 7)), "pse must be"),
    ("npu_fusion_attention", "pse dtype", lambda: attend(pse=ones(2, 4, 5, 7, dtype=BF16)), "equal"),
    ("npu_fusion_attention", "sink dtype", lambda: attend(sink=ones(4, dtype=BF16)), "sink"),
    ("npu_fusion_attention", "lengths", lambda: attend(actual_seq_qlen=[5, 10]), "for TND"),
    ("npu_fusion_attention", "no lengths", lambda: attend(q=(9, 4, 8), k=(9, 2, 8), layout="TND"), "needs actual_seq"),
    ("npu_fusion_attention", "not cumulative", lambda: packed([4, 3, 9], [4, 5, 9]), "cumulative"),
    ("npu_fusion_attention", "short of T", lambda: packed([4, 8], [4, 9]), "must be T=9"),
    ("npu_fusion_attention", "count", lambda: packed([4, 9], [9]), "as many"),
    ("npu_fusion_attention", "Sq > Skv", lambda: packed([5, 9], [4, 9], atten_mask=triangle(), sparse_mode=3), "Sq <="),
    ("npu_fusion_attention", "lower case", lambda: attend(q=(9, 4, 8), k=(9, 2, 8), layout="tnd"), "needs actual_seq"),
    ("npu_grouped_matmul", "group_type None", lambda: gmm(kind=None), "Requires manual passing group_type"),
    ("npu_grouped_matmul", "group_type 1", lambda: gmm(kind=1), "must be -1, 0 or 2, but now is [1]"),
    ("npu_grouped_matmul", "int32 groups", lambda: gmm(groups=torch.tensor([1, 3], device="npu:0").int()), "int64"),
    ("npu_grouped_matmul", "groups on the CPU", lambda: gmm(groups=torch.tensor([1, 3])), "same device"),
    ("npu_grouped_matmul", "too many rows", lambda: gmm(groups=(3, 3)), "beyond the 4 rows"),
    ("npu_grouped_matmul", "entries", lambda: gmm(groups=(1, 1, 2)), "one entry for each of 2 groups"),
    ("npu_grouped_matmul", "one count", lambda: gmm(weight=ones(1, 5, 3), groups=(3,)), "longer than 1"),
    ("npu_grouped_matmul", "decreasing", lambda: gmm(groups=(3, 1), group_list_type=0), "non-decreasing"),
    ("npu_grouped_matmul", "dtypes", lambda: gmm(x=ones(4, 5, dtype=BF16)), "equal"),
    ("npu_grouped_matmul", "transposed x", lambda: gmm(x=ones(5, 4).t()), "not transposed"),
    ("npu_grouped_matmul", "strided weight", lambda: gmm(weight=ones(5, 2, 3).transpose(0, 1)), "transposed view"),
    ("npu_grouped_matmul", "columns", lambda: gmm(x=ones(5, 4), weight=ones(4, 3), kind=2), "transposed view"),
    ("npu_grouped_matmul", "bias", lambda: gmm(x=ones(4, 5, dtype=BF16), weight=ones(2, 5, 3, dtype=BF16),
        bias=[ones(2, 3, dtype=BF16)]), "bias must be float32"),
    ("npu_grouped_matmul", "inner sizes", lambda: gmm(weight=ones(2, 6, 3)), "first of weight"),
    ("npu_moe_token_permute", "padded", lambda: permute(ones(3, 4), ones(3, 2).int(), padded_mode=True), "padded_mode"),
    ("npu_moe_token_permute", "float indices", lambda: permute(ones(3, 4), ones(3, 2)), "indices"),
    ("npu_moe_token_permute", "tokens 3-D", lambda: permute(ones(1, 3, 4), ones(1, 2).int()), "[N, H]"),
    ("npu_moe_token_permute", "rows", lambda: permute(ones(3, 4), ones(2, 2).int()), "indices must be"),
    ("npu_moe_token_unpermute", "float", lambda: torch_npu.npu_moe_token_unpermute(ones(3, 4), ones(3)), "int32"),
    ("npu_moe_token_unpermute", "probs", lambda: torch_npu.npu_moe_token_unpermute(
        ones(4, 4), ones(4).int(), ones(3, 2)), "probs must be"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "call", "words"),
    [(operator, call, words) for operator, _, call, words in CASES],
    ids=[f"{operator}: {what}" for operator, what, _, _ in CASES],
)
def test_is_refused(operator: str, call: Callable[[], Any], words: str) -> None:
    with pytest.raises(Refused) as refusal:
        call()
    message = str(refusal.value)
    assert message.startswith((f"{operator}:", f"_{operator}:"))
    assert words in message


TURNED = [0.0, 2.0]  # halves of a head of ones, rotated with ones

# The nearest allowed neighbours of some of the refusals above, all of ones: call, the different values of its answer.
ALLOWED: dict[str, tuple[Callable[[], Any], list[float]]] = {
    "rope: 36 of 1": (lambda: rope((2, 36, 9, 32), (1, 1, 9, 32)), TURNED),
    "rope: 37 of each": (lambda: rope((2, 37, 9, 32), (2, 1, 9, 32)), TURNED),
    "rope: one of 100": (lambda: rope((1, 100, 9, 32), (1, 1, 9, 32)), TURNED),
    "rope: 100 alone": (lambda: rope((2, 100, 1, 32), (1, 1, 1, 32)), TURNED),
    "rope: long": (lambda: rope((2, 3, 441, 12), (1, 1, 441, 12)), TURNED),
    "rope: wide": (lambda: rope((2, 3, 9, 896), (2, 1, 9, 896)), TURNED),
    "norm: strided": (lambda: norm(ones(8, 3, dtype=BF16).t(), ones(8))[0], [1.0]),
    "attention: compressed mask": (lambda: attend(atten_mask=triangle(), sparse_mode=2)[0], [1.0]),
    "attention: an empty sequence": (lambda: packed([4, 4, 9], [4, 5, 9])[0], [1.0]),
    "grouped matmul: an empty group": (lambda: gmm(groups=(0, 4))[0], [5.0]),
    "grouped matmul: no rows": (lambda: gmm(x=ones(0, 5), groups=(0, 0))[0], []),
}


@pytest.mark.parametrize("what", ALLOWED)
def test_what_the_limits_allow_is_computed(what: str) -> None:
    call, values = ALLOWED[what]
    assert call().float().cpu().round(decimals=4).unique().tolist() == values
