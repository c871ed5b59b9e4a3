"""What our own Python costs, without an NPU: its implementations serve the CPU, their operators stood in for.

On the CPU the implementations make as many operators as the originals, which says nothing of a device where the
operator is one call. Here those for the NPU run as they are, but each operator of torch_npu's is one of torch's, in
C++ and with an autograd node where it has one. Results are wrong on purpose: only host time may be read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

Called = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], bool]  # the last: with gradients


def rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, ...]:
    return torch.native_layer_norm(x, x.shape[-1:], gamma, None, epsilon)


def rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, rotary_mode: str = "half") -> Tensor:
    return torch.addcmul(x, cos, sin)


def swiglu(gate_up: Tensor, dim: int = -1) -> Tensor:
    return torch._C._nn.glu(gate_up, dim)


def attention(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> tuple[Tensor]:
    """In whatever layout: heads beside tokens or the other way round."""
    return (torch._C._nn.scaled_dot_product_attention(query, key, value, enable_gqa=True),)


def grouped_matmul(x: list[Tensor], weight: list[Tensor], *, group_list: Tensor, group_type: int, **_: Any) -> Any:
    if group_type == 0:
        return (torch.mm(x[0], _zeros(x[0].dtype, x[0].shape[1], weight[0].shape[-1])),)
    return (x[0].new_empty((group_list.shape[0], x[0].shape[0], weight[0].shape[1])),)


def permute(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    order = _order(tokens.shape[0], indices.numel())
    return tokens.index_select(0, order), order


def unpermute(rows: Tensor, positions: Tensor, router_weights: Tensor) -> Tensor:
    """With an operator more than the NPU's: a view."""
    return torch.mm(router_weights.detach().to(rows.dtype), rows[: router_weights.shape[1]])


def cross_entropy(logits: Tensor, labels: Tensor, reduction: str = "mean") -> tuple[Tensor | None, ...]:
    """Of labels that are all 0: with an operator more than the NPU's, a view."""
    log_probabilities = torch.log_softmax(logits, -1)
    return log_probabilities.select(-1, 0), log_probabilities, None, None


def histogram(numbers: Tensor, bins: int, **_: Any) -> Tensor:
    """The CPU has none of whole numbers."""
    if numbers.is_floating_point():
        return _histogram(numbers, bins, **_)
    return numbers.new_zeros(bins)


_histogram = torch.histc
STAND_INS = {
    "npu_rms_norm": rms_norm,
    "npu_rotary_mul": rotary_mul,
    "npu_swiglu": swiglu,
    "npu_fusion_attention": attention,
    "npu_grouped_matmul": grouped_matmul,
    "npu_moe_token_permute": permute,
    "npu_moe_token_unpermute": unpermute,
    "npu_cross_entropy_loss": cross_entropy,
}


def stand_in() -> None:
    """For the rest of this process, before anything is applied."""
    from npu_patch.patches import CATALOGUE

    for name, operator in STAND_INS.items():
        setattr(torch.ops.npu, name, operator)
    torch.histc = histogram
    for patch in CATALOGUE:
        for implementations in _implementations_of(patch):
            if any(implementation.device_types == ("npu",) for implementation in implementations):
                for implementation in implementations:
                    _serve_the_cpu(implementation)


def _implementations_of(patch: Any) -> Iterator[Any]:
    """Of each of its ops; a former checkout's patch has no op."""
    if not hasattr(patch, "op"):
        yield patch.implementations
        return
    yield from (op.implementations for op in (patch.op, *patch.further_ops))


def _serve_the_cpu(implementation: Any) -> None:
    """In the place of torch's own, where it is one of torch_npu's operators."""
    others = tuple(each for each in implementation.device_types if each != "cpu")
    if implementation.device_types == ("npu",):
        object.__setattr__(implementation, "missing", lambda: None)
        object.__setattr__(implementation, "partly", {})
        others = ("npu", "cpu")
    object.__setattr__(implementation, "device_types", others)


def called_by(form: Callable[[], Any]) -> list[Called]:
    """Each stand-in that a call of `form` calls."""
    found: list[Called] = []

    def noting(operator: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            found.append((operator, args, kwargs, torch.is_grad_enabled()))
            return operator(*args, **kwargs)

        return noted

    for name, operator in STAND_INS.items():
        setattr(torch.ops.npu, name, noting(operator))
    try:
        form()
    finally:
        for name, operator in STAND_INS.items():
            setattr(torch.ops.npu, name, operator)
    return found


@cache
def _zeros(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@cache
def _order(tokens: int, rows: int) -> Tensor:
    return (torch.arange(rows) % tokens).int()
