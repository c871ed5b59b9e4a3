"""Moving tokens to their experts and back: npu_moe_token_permute, npu_moe_token_unpermute and their gradients.

Source: torch_npu's operator documentation and the CANN kernels (ops-transformer, moe_token_permute and unpermute).
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, given, require, require_dtype, short
from .kernel import Kernel

MOST_EXPERTS_PER_TOKEN = 512
INTEGERS = (torch.int32, torch.int64)


def npu_moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of tokens, once for each of their experts, sorted by expert (stable).

    tokens: [N, H], float16, bfloat16 or float32. indices: expert of each token, [N, topk] or [N], int32 or int64.
    Returns the permuted rows [N * topk, H] and sorted_indices, int32 [N * topk]: the row that each (token, choice) went
    to, `permuted[sorted_indices[i]] == tokens[i // topk]`. num_out_tokens > 0 keeps that many rows, < 0 drops as many.
    """
    name = "npu_moe_token_permute"
    require(not padded_mode, name, "padded_mode must be False")
    require_dtype(name, "tokens", tokens, FLOATS)
    require_dtype(name, "indices", indices, INTEGERS)
    require(tokens.dim() == 2, name, f"tokens must be [N, H], not {list(tokens.shape)}")
    require(
        indices.dim() in (1, 2) and indices.shape[0] == tokens.shape[0],
        name,
        f"indices must be [N, topk] or [N] with N={tokens.shape[0]}, not {list(indices.shape)}",
    )
    topk = indices.shape[1] if indices.dim() == 2 else 1
    require(topk <= MOST_EXPERTS_PER_TOKEN, name, f"topk must be at most {MOST_EXPERTS_PER_TOKEN}, not {topk}")
    require(
        not indices.numel() or bool((indices < 1 << 24).all()),
        name,
        "expert indices must be below 2**24 (they are sorted as float32)",
    )
    order = indices.flatten().argsort(stable=True)
    kept = _kept_rows(num_out_tokens, indices.numel())
    return tokens[order[:kept] // max(topk, 1)], order.argsort().to(torch.int32)


def npu_moe_token_permute_grad_v2(
    grad_permuted_tokens: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: int,
    tokens_dtype: torch.dtype,
    num_topK: int,
    padded_mode: bool = False,
) -> Tensor:
    """The gradient of tokens [N, H]: the sum over each token's rows, accumulated in float32."""
    rows = _gather(grad_permuted_tokens, sorted_indices)
    summed = rows.float().view(tokens_size_0, num_topK, rows.shape[-1]).sum(1)
    return summed.to(tokens_dtype)


def npu_moe_token_permute_grad(
    tokens: Tensor,
    grad_permuted_tokens: Tensor,
    indices: Tensor,
    sorted_indices: Tensor,
    padded_mode: bool = False,
) -> Tensor:
    topk = indices.shape[1] if indices.dim() == 2 else 1
    return npu_moe_token_permute_grad_v2(
        grad_permuted_tokens, sorted_indices, tokens.shape[0], tokens.dtype, topk, padded_mode
    )


def npu_moe_token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> Tensor:
    """`out[i] = sum_j permuted[sorted_indices[i * topk + j]] * probs[i, j]`, accumulated in float32, rounded once.

    permuted_tokens: [M, H]; sorted_indices: int32 [N * topk]; probs: [N, topk], any of the float dtypes. Rows at or
    beyond M count as zero. Without probs topk is 1: rows are moved back, not summed. Returns [N, H] in the dtype of
    permuted_tokens.
    """
    name = "npu_moe_token_unpermute"
    _check_unpermute(name, permuted_tokens, sorted_indices, probs, padded_mode)
    rows = _gather(permuted_tokens, sorted_indices)
    if probs is None:
        return rows
    tokens, topk = probs.shape
    weighted = rows.float().view(tokens, topk, rows.shape[-1]) * probs.float()[..., None]
    # A row that was dropped contributes nothing, whatever its weight.
    return weighted.sum(1).to(permuted_tokens.dtype)


def npu_moe_token_unpermute_for_training(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """_npu_moe_token_unpermute: the result, and what backward needs of permuted_tokens (nothing without probs)."""
    out = npu_moe_token_unpermute(permuted_tokens, sorted_indices, probs, padded_mode, restore_shape)
    return out, permuted_tokens.new_empty(0) if probs is None else permuted_tokens


def npu_moe_token_unpermute_grad_v2(
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    permuted_tokens_size_0: int,
    permuted_tokens_dtype: torch.dtype,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
    permuted_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of permuted_tokens and probs (None without probs).

    `d_permuted[sorted[i * topk + j]] = grad[i] * probs[i, j]`, `d_probs[i, j] = sum_h grad[i] * permuted[...]`.
    Rows that no index points to stay unwritten (NaN here).
    """
    name = "npu_moe_token_unpermute_grad"
    grad = grad_unpermuted_tokens.float()
    width = grad.shape[-1]
    kept = sorted_indices < permuted_tokens_size_0
    rows = sorted_indices.long()[kept]
    d_permuted = torch.full((permuted_tokens_size_0, width), torch.nan, dtype=permuted_tokens_dtype)
    if probs is None:
        d_permuted[rows] = grad[kept].to(permuted_tokens_dtype)
        return d_permuted, None
    permuted = given(permuted_tokens, name, "probs need permuted_tokens")
    tokens, topk = probs.shape
    spread = (grad[:, None, :] * probs.float()[..., None]).reshape(tokens * topk, width)
    d_permuted[rows] = spread[kept].to(permuted_tokens_dtype)
    gathered = _gather(permuted, sorted_indices).float().view(tokens, topk, width)
    return d_permuted, (gathered * grad[:, None, :]).sum(-1).to(probs.dtype)


def npu_moe_token_unpermute_grad(
    permuted_tokens: Tensor,
    grad_unpermuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: list[int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    return npu_moe_token_unpermute_grad_v2(
        grad_unpermuted_tokens,
        sorted_indices,
        permuted_tokens.shape[0],
        permuted_tokens.dtype,
        probs,
        padded_mode,
        restore_shape,
        permuted_tokens,
    )


def _kept_rows(num_out_tokens: int | None, rows: int) -> int:
    if not num_out_tokens:
        return rows
    return min(num_out_tokens, rows) if num_out_tokens > 0 else max(rows + num_out_tokens, 0)


def _gather(rows: Tensor, indices: Tensor) -> Tensor:
    """rows[indices], and zeros where the index is beyond the rows."""
    kept = indices < rows.shape[0]
    gathered = torch.zeros((indices.numel(), rows.shape[-1]), dtype=rows.dtype)
    gathered[kept] = rows[indices[kept].long()]
    return gathered


def _check_unpermute(
    name: str, permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None, padded_mode: bool
) -> None:
    require(not padded_mode, name, "padded_mode must be False")
    require_dtype(name, "permuted_tokens", permuted_tokens, FLOATS)
    require(permuted_tokens.dim() == 2, name, f"permuted_tokens must be [M, H], not {list(permuted_tokens.shape)}")
    require(
        sorted_indices.dtype == torch.int32 and sorted_indices.dim() == 1,
        name,
        f"sorted_indices must be 1-D int32, not {short(sorted_indices.dtype)} {list(sorted_indices.shape)}",
    )
    if probs is not None:
        require_dtype(name, "probs", probs, FLOATS)
        require(
            probs.dim() == 2 and probs.numel() == sorted_indices.numel(),
            name,
            f"probs must be [N, topk] with N * topk = {sorted_indices.numel()}, not {list(probs.shape)}",
        )


KERNELS = {
    "npu_moe_token_permute": Kernel(npu_moe_token_permute, made_contiguous=("tokens", "indices")),
    "npu_moe_token_permute_grad": Kernel(npu_moe_token_permute_grad),
    "npu_moe_token_permute_grad_v2": Kernel(npu_moe_token_permute_grad_v2, made_contiguous=("grad_permuted_tokens",)),
    "npu_moe_token_unpermute": Kernel(npu_moe_token_unpermute, made_contiguous=("permuted_tokens", "probs")),
    "_npu_moe_token_unpermute": Kernel(
        npu_moe_token_unpermute_for_training, made_contiguous=("permuted_tokens", "probs")
    ),
    "npu_moe_token_unpermute_grad": Kernel(npu_moe_token_unpermute_grad),
    "npu_moe_token_unpermute_grad_v2": Kernel(
        npu_moe_token_unpermute_grad_v2, made_contiguous=("grad_unpermuted_tokens", "probs")
    ),
}
