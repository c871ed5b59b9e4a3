"""Routed experts: each token through the feed-forward layers that its router chose, summed by the router's weights.

    y[t] = sum over j of router_weights[t, j] * expert[indices[t, j]](x[t])
    expert(x) = after(gate(x @ up + bias) @ down + bias)

Sorted by expert, all experts together are two grouped products (three where gate and up are two weights): permute ->
grouped matmul -> gate -> grouped matmul -> unpermute. No loop over experts or tokens, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.ops.experts.grouped_matmul import (
    NPU_GROUPED_MATMUL,
    NPU_PRODUCTS,
    TORCH_PRODUCTS,
    Products,
    Weights,
    grouped_matmul,
    torch_is_missing,
    why_unsupported,
)
from npu_patch.ops.experts.token_permute import (
    MOST_EXPERTS_PER_TOKEN,
    NPU_MOVES,
    NPU_PERMUTE,
    NPU_UNPERMUTE,
    TORCH_MOVES,
    Moves,
    permute,
    unpermute,
)
from npu_patch.ops.swiglu import NPU_SWIGLU, torch_swiglu
from npu_patch.serving.implementation import FLOAT_DTYPES, Implementation, is_plain, layout, needs_operators
from npu_patch.serving.op import Op

MOST_ELEMENTS = 2**22  # of one expert's first weight; beyond that it is checked narrower inside
STEP = 16  # what inner widths are a multiple of, where they are made narrower


@dataclass(frozen=True)
class Experts:
    """The experts of one layer at one call.

    `up`: one weight (gate and up in one, or up alone), or two (gate, up). `gate`: from the result of `up` `[M, 2 I]`
    (or `[M, I]`) to `[M, I]`, None for silu(first half) * second half. `after`: applied to each expert's output, row by
    row. `sentinels`: an index may say "not on this rank".
    """

    up: tuple[Weights, ...]
    down: Weights
    gate: Callable[[Tensor], Tensor] | None = None
    after: Callable[[Tensor], Tensor] | None = None
    sentinels: bool = False


@dataclass(frozen=True)
class Kernels:
    """What a device computes experts with."""

    products: Products
    moves: Moves
    swiglu: Callable[[Tensor], Tensor]


def routed_experts(
    kernels: Kernels, tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts
) -> Tensor:
    """tokens `[N, H]`, indices `[N, k]`, router_weights `[N, k]` -> `[N, H]` in the dtype of tokens, computed in that
    of the weights."""
    x = tokens.to(experts.down.tensors[0].dtype)
    routed = permute(kernels.moves, x, indices, experts.down.groups, experts.sentinels)
    products = [grouped_matmul(kernels.products, routed.rows, up, routed.grouping) for up in experts.up]
    hidden = products[0] if len(products) == 1 else torch.cat(products, -1)
    beyond = routed.beyond if experts.gate is not None or experts.after is not None else None
    written = _Written(beyond() if beyond is not None else None)
    hidden = kernels.swiglu(hidden) if experts.gate is None else written.through(experts.gate, hidden)
    rows = grouped_matmul(kernels.products, hidden, experts.down, routed.grouping)
    if experts.after is not None:
        rows = written.through(experts.after, rows)
    return unpermute(kernels.moves, rows, routed.positions, router_weights).to(tokens.dtype)


@dataclass(frozen=True)
class _Written:
    """Keeps unwritten rows out of functions that are not ours: a parameter's gradient would sum over them."""

    beyond: Tensor | None

    def through(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        if self.beyond is None:
            return function(rows)
        return function(rows.masked_fill(self.beyond, 0.0)).masked_fill(self.beyond, 0.0)


def reference(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts) -> Tensor:
    """The same in plain torch, every expert for every token; for a few small ones."""
    hidden = torch.cat([_every(tokens, up) for up in experts.up], -1)
    gate = silu_of_halves if experts.gate is None else experts.gate
    rows = _every(gate(hidden), experts.down)
    if experts.after is not None:
        rows = experts.after(rows)
    chosen = rows[indices, torch.arange(tokens.shape[0])[:, None]]
    return (chosen * router_weights[..., None]).sum(1).to(tokens.dtype)


def _every(x: Tensor, weights: Weights) -> Tensor:
    """x `[N, K]` or `[E, N, K]` times each weight: `[E, N, N']`."""
    weight = weights.tensors[0] if weights.tensors[0].dim() == 3 else torch.stack(weights.tensors)
    y = x @ (weight.mT if weights.transposed else weight)
    return y if weights.bias is None else y + weights.bias[:, None]


def silu_of_halves(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def _npu_swiglu(gate_up: Tensor) -> Tensor:
    return torch.ops.npu.npu_swiglu(gate_up, dim=-1)


def _unsupported(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts) -> str | None:
    every = (*experts.up, experts.down)
    biases = [weights.bias for weights in every if weights.bias is not None]
    tensors = [tokens, indices, router_weights, *biases, *(tensor for weights in every for tensor in weights.tensors)]
    for tensor in tensors:
        if not is_plain(tensor):
            return "tensor subclass"
        if tensor.device != tokens.device:
            return f"tokens on {tokens.device.type}, weights or routing on {tensor.device.type}"
    dtype = experts.down.tensors[0].dtype
    if dtype not in FLOAT_DTYPES or not tokens.is_floating_point():
        return f"tokens in {tokens.dtype}, weights in {dtype}"
    if tokens.dim() != 2 or indices.dim() != 2 or indices.shape[0] != tokens.shape[0]:
        return f"tokens and indices of shapes that do not fit: {layout(tokens)}; {layout(indices)}"
    if router_weights.shape != indices.shape or not router_weights.is_floating_point():
        return f"router weights of another shape than indices: {layout(router_weights)}; {layout(indices)}"
    if indices.dtype not in (torch.int32, torch.int64):
        return f"indices in {indices.dtype}"
    if not indices.numel():
        return "no tokens"
    if indices.shape[1] > MOST_EXPERTS_PER_TOKEN:
        return f"{indices.shape[1]} experts for each token"
    for weights in every:
        reason = why_unsupported(weights, dtype)
        if reason is not None:
            return reason
        if weights.groups != experts.down.groups:
            return f"{weights.groups} and {experts.down.groups} experts in one layer"
    if any(up.width_in != tokens.shape[1] for up in experts.up) or experts.down.width_out != tokens.shape[1]:
        return f"tokens of {tokens.shape[1]}, experts of {experts.up[0].width_in} to {experts.down.width_out}"
    return None


_NPU = Kernels(NPU_PRODUCTS, NPU_MOVES, _npu_swiglu)
_TORCH = Kernels(TORCH_PRODUCTS, TORCH_MOVES, torch_swiglu)


@dataclass(frozen=True)
class ExpertsForm:
    """What may decide who serves experts: large ones count as narrower inside, as which they are checked. `ups`: how
    many weights gate and up are. `in_memory`: whether they are contiguous."""

    width: int
    up_width: int
    inner: int
    ups: int
    packed: bool
    transposed: bool
    in_memory: bool
    biased: bool
    own_gate: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, experts: Experts) -> ExpertsForm:
        up, down, ups = experts.up[0], experts.down, len(experts.up)
        first, inner = up.tensors[0], down.width_in
        elements = up.width_in * up.width_out * ups
        if elements > MOST_ELEMENTS:
            inner = max(STEP, MOST_ELEMENTS * inner // elements // STEP * STEP)
        layout = first.dim() == 3, up.transposed, first.is_contiguous(), up.bias is not None
        narrowed = up.width_out * inner // down.width_in, inner
        return cls(up.width_in, *narrowed, ups, *layout, experts.gate is not None, first.dtype)


def _key(tokens: Tensor, indices: Tensor, router_weights: Tensor, experts: Experts) -> ExpertsForm:
    return ExpertsForm.of(experts)


EXPERTS = Op(
    "experts",
    (
        Implementation(
            "torch_npu.npu_grouped_matmul",
            ("npu",),
            functools.partial(routed_experts, _NPU),
            _unsupported,
            needs_operators(NPU_GROUPED_MATMUL, NPU_PERMUTE, NPU_UNPERMUTE, NPU_SWIGLU),
        ),
        Implementation(
            "torch.nn.functional.grouped_mm",
            ("cuda", "cpu"),
            functools.partial(routed_experts, _TORCH),
            _unsupported,
            torch_is_missing,
        ),
    ),
    _key,
    reference,
)
