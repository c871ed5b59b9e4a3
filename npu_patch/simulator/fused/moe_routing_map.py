"""Moving tokens to their experts and back by a routing map: npu_moe_token_permute_with_routing_map,
npu_moe_token_unpermute_with_routing_map and their gradients.

Source: op-plugin (MoeTokenPermuteWithRoutingMapOpApi.cpp and its neighbours, and their tests) and the CANN kernels
(ops-transformer, moe_token_permute_with_routing_map). Sums are accumulated in float32 and rounded once.
"""

from typing import Any

import torch
from torch import Tensor

from ..refusal import FLOATS, given, require, require_dtype
from .kernel import Kernel

MAPS = (torch.bool, torch.int8)


def npu_moe_token_permute_with_routing_map(
    tokens: Tensor,
    routing_map: Tensor,
    *,
    probs: Tensor | None = None,
    num_out_tokens: int | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The rows of tokens for each expert, expert after expert, their probs (None without), and sorted_indices (int32).

    tokens: [N, H], float16, bfloat16 or float32; routing_map: bool or int8 [N, E]; probs: [N, E]. Each token has
    num_out_tokens / N experts (None: one), and `permuted[sorted_indices[i * topk + j]]` is the row of token i for its
    j-th expert. With drop_and_pad each expert has num_out_tokens / E rows: its first tokens, then others that fill it;
    sorted_indices are their tokens.
    """
    name = "npu_moe_token_permute_with_routing_map"
    require_dtype(name, "tokens", tokens, FLOATS)
    require(tokens.dim() == 2, name, f"tokens must be [N, H], not {list(tokens.shape)}")
    _check_map(name, routing_map, probs, tokens.shape[0])
    asked = tokens.shape[0] if num_out_tokens is None else num_out_tokens
    by_expert = routing_map.bool().t()
    if drop_and_pad:
        sources = _padded_sources(name, by_expert, asked)
        experts = torch.arange(len(by_expert)).repeat_interleave(len(sources) // len(by_expert))
        return tokens[sources], None if probs is None else probs[sources, experts], sources.to(torch.int32)
    _topk(name, routing_map, asked)
    experts, sources = by_expert.nonzero(as_tuple=True)
    sorted_indices = sources.argsort(stable=True).to(torch.int32)
    return tokens[sources], None if probs is None else probs[sources, experts], sorted_indices


def npu_moe_token_permute_with_routing_map_grad(
    permuted_token_out_grad: Tensor,
    probs_grad: Tensor | None,
    sorted_indices: Tensor,
    routing_map: Tensor,
    experts_num: int,
    tokens_num: int,
    drop_and_pad: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of tokens [N, H] and probs [N, E] (None without probs_grad)."""
    grad, where = permuted_token_out_grad, sorted_indices.long()
    d_probs = None if probs_grad is None else torch.zeros((tokens_num, experts_num), dtype=probs_grad.dtype)
    if drop_and_pad:
        d_tokens = torch.zeros((tokens_num, grad.shape[1])).index_add(0, where, grad.float())
        if probs_grad is not None and d_probs is not None:
            experts = torch.arange(experts_num).repeat_interleave(len(where) // experts_num)
            d_probs[where, experts] = probs_grad
        return d_tokens.to(grad.dtype), d_probs
    d_tokens = grad[where].float().view(tokens_num, -1, grad.shape[1]).sum(1)
    if probs_grad is not None and d_probs is not None:
        d_probs[routing_map.bool()] = probs_grad[where]
    return d_tokens.to(grad.dtype), d_probs


def npu_moe_token_unpermute_with_routing_map(*arguments: Any, **named: Any) -> Tensor:
    """The first result of `unpermute`: torch_npu calls that one where a gradient is needed."""
    return unpermute(*arguments, **named)[0]


def unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    restore_shape: list[int],
    *,
    probs: Tensor | None = None,
    routing_map: Tensor | None = None,
    drop_and_pad: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """_npu_moe_token_unpermute_with_routing_map: the sum of each token's rows times their probs (1 without), of
    restore_shape [N, H]; and what backward takes: with drop_and_pad the rows in order of their tokens, the tokens in
    order, and the probs of the rows; else the probs alone (the indices stay unwritten, -1 here)."""
    name = "npu_moe_token_unpermute_with_routing_map"
    require_dtype(name, "permuted_tokens", permuted_tokens, FLOATS)
    require_dtype(name, "sorted_indices", sorted_indices, (torch.int32,))
    require(
        permuted_tokens.dim() == 2 and len(restore_shape) == 2 and restore_shape[1] == permuted_tokens.shape[1],
        name,
        f"permuted_tokens must be [M, H] and restore_shape [N, H], not {list(permuted_tokens.shape)}, {restore_shape}",
    )
    require(
        sorted_indices.shape == permuted_tokens.shape[:1],
        name,
        f"sorted_indices must be [M] = [{permuted_tokens.shape[0]}], not {list(sorted_indices.shape)}",
    )
    if routing_map is not None:
        _check_map(name, routing_map, probs, restore_shape[0])
    rows, where = permuted_tokens.float(), sorted_indices.long()
    weights = None
    if probs is not None:
        weights = _weights(name, probs, given(routing_map, name, "probs need routing_map"), where, drop_and_pad)
    if drop_and_pad:
        if weights is not None:
            rows = rows * weights.float()[:, None]
        out = torch.zeros(restore_shape).index_add(0, where, rows)
        token_ids, out_index = sorted_indices.sort(stable=True)
        return out.to(permuted_tokens.dtype), out_index.to(torch.int32), token_ids, weights
    rows = rows[where]
    require(
        restore_shape[0] > 0 and len(where) % restore_shape[0] == 0,
        name,
        f"each of {restore_shape[0]} tokens must have as many of the {len(where)} rows",
    )
    if weights is not None:
        rows = rows * weights.float()[:, None]
    unwritten = torch.full_like(sorted_indices, -1)
    out = rows.view(restore_shape[0], -1, restore_shape[1]).sum(1)
    return out.to(permuted_tokens.dtype), unwritten, unwritten.clone(), weights


def npu_moe_token_unpermute_with_routing_map_grad(
    unpermuted_tokens_grad: Tensor,
    out_index: Tensor,
    permuted_token_id: Tensor,
    routing_map: Tensor | None,
    permuted_tokens: Tensor | None,
    probs: Tensor | None,
    drop_and_pad: bool,
    restore_shape: list[int],
) -> tuple[Tensor, Tensor | None]:
    """Gradients of permuted_tokens [M, H] and probs [N, E] (None without), in grad's dtype. Without drop_and_pad both
    indices are sorted_indices."""
    name = "npu_moe_token_unpermute_with_routing_map_grad"
    grad, rows = unpermuted_tokens_grad.float(), out_index.long()
    if drop_and_pad:
        tokens = permuted_token_id.long()
    else:
        tokens = torch.arange(restore_shape[0]).repeat_interleave(len(rows) // restore_shape[0])
    spread = grad[tokens]
    d_probs = None
    if probs is not None:
        shown = given(routing_map, name, "probs need permuted_tokens and a map")
        permuted = given(permuted_tokens, name, "probs need permuted_tokens and a map")
        experts = rows // (len(rows) // probs.shape[1]) if drop_and_pad else shown.bool().nonzero()[:, 1]
        d_probs = torch.zeros(probs.shape, dtype=unpermuted_tokens_grad.dtype)
        products = (spread * permuted.float()[rows]).sum(-1)
        d_probs[tokens, experts] = products.to(d_probs.dtype)
        spread = spread * probs.float()[tokens, experts][:, None]
    d_permuted = torch.empty((len(rows), grad.shape[1]), dtype=unpermuted_tokens_grad.dtype)
    d_permuted[rows] = spread.to(d_permuted.dtype)
    return d_permuted, d_probs


def _weights(name: str, probs: Tensor, routing_map: Tensor, where: Tensor, drop_and_pad: bool) -> Tensor:
    """The prob of each row, with drop_and_pad in order of the rows, else of the tokens."""
    if drop_and_pad:
        require(len(where) % probs.shape[1] == 0, name, f"{len(where)} rows for {probs.shape[1]} experts")
        return probs[where, torch.arange(probs.shape[1]).repeat_interleave(len(where) // probs.shape[1])]
    weights = probs[routing_map.bool()]
    require(len(weights) == len(where), name, f"routing_map has {len(weights)} rows, not {len(where)}")
    return weights


def _padded_sources(name: str, by_expert: Tensor, asked: int) -> Tensor:
    capacity = asked // len(by_expert)
    require(
        capacity <= by_expert.shape[1],
        name,
        f"num_out_tokens {asked} for {len(by_expert)} experts is more than the {by_expert.shape[1]} tokens for each",
    )
    return by_expert.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :capacity].flatten()


def _topk(name: str, routing_map: Tensor, asked: int) -> int:
    topk = asked // max(routing_map.shape[0], 1)
    require(
        bool((routing_map.bool().sum(1) == topk).all()),
        name,
        f"each token must have num_out_tokens / N = {asked} / {routing_map.shape[0]} = {topk} experts in routing_map",
    )
    return topk


def _check_map(name: str, routing_map: Tensor, probs: Tensor | None, tokens: int) -> None:
    require_dtype(name, "routing_map", routing_map, MAPS)
    require(
        routing_map.dim() == 2 and routing_map.shape[0] == tokens,
        name,
        f"routing_map must be [N, E] with N={tokens}, not {list(routing_map.shape)}",
    )
    if probs is not None:
        require_dtype(name, "probs", probs, FLOATS)
        require(probs.shape == routing_map.shape, name, f"probs must be [N, E], not {list(probs.shape)}")


KERNELS = {
    "npu_moe_token_permute_with_routing_map": Kernel(
        npu_moe_token_permute_with_routing_map, made_contiguous=("tokens", "routing_map")
    ),
    "npu_moe_token_permute_with_routing_map_grad": Kernel(npu_moe_token_permute_with_routing_map_grad),
    "npu_moe_token_unpermute_with_routing_map": Kernel(
        npu_moe_token_unpermute_with_routing_map, made_contiguous=("permuted_tokens",)
    ),
    "_npu_moe_token_unpermute_with_routing_map": Kernel(unpermute, made_contiguous=("permuted_tokens",)),
    "npu_moe_token_unpermute_with_routing_map_grad": Kernel(npu_moe_token_unpermute_with_routing_map_grad),
}
