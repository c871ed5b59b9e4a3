"""Choosing experts and laying tokens out for them, for inference: npu_moe_gating_top_k_softmax (_v2) and
npu_moe_init_routing.

Source: torch_npu's operator documentation and op-plugin (MoeGatingTopKSoftmaxKernelNpuOpApi.cpp,
MoeInitRoutingKernelNpuOpApi.cpp). None has a derivative: torch_npu raises in backward of npu_moe_gating_top_k_softmax
and leaves the other gradients undefined.
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, require, require_dtype
from .kernel import Kernel

MOST_CHOICES = 1024


def npu_moe_gating_top_k_softmax(
    x: Tensor, finished: Tensor | None = None, k: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest of softmax(x), not normalised again, with their experts (int32; the number of experts in rows that
    are finished) and row_idx (int32): `arange(rows * k)` column by column.

    x: [rows, E] or [B, S, E], float16, bfloat16 or float32; finished: bool, x's shape without E. Ties go to the lower
    expert.
    """
    name = "npu_moe_gating_top_k_softmax"
    _check(name, x, finished, k)
    values, experts = _largest(x.float().softmax(-1), k)
    rows = x.shape[:-1].numel()
    row_idx = torch.arange(rows * k, dtype=torch.int32).view(k, rows).t().reshape(experts.shape)
    return values.to(x.dtype), _with_finished(experts, finished, x.shape[-1]), row_idx


def npu_moe_gating_top_k_softmax_v2(
    x: Tensor,
    *,
    k: int = 1,
    finished: Tensor | None = None,
    renorm: int | None = 0,
    output_softmax: bool | None = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """renorm 0: the k largest of softmax(x); renorm 1: softmax of the k largest of x. Third, with renorm 0 and
    output_softmax, the whole softmax in float32, else an empty tensor."""
    name = "npu_moe_gating_top_k_softmax_v2"
    _check(name, x, finished, k)
    require(renorm in (None, 0, 1), name, f"renorm must be 0 or 1, not {renorm}")
    wide = x.float()
    whole = torch.empty(0)
    if renorm:
        values, experts = _largest(wide, k)
        values = values.softmax(-1)
    else:
        whole = wide.softmax(-1)
        values, experts = _largest(whole, k)
    shown = whole if output_softmax and not renorm else torch.empty(0)
    return values.to(x.dtype), _with_finished(experts, finished, x.shape[-1]), shown


def npu_moe_init_routing(
    x: Tensor, row_idx: Tensor, expert_idx: Tensor, active_num: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of x sorted by expert (stable): expanded_x [min(active_num, N) * K, H], expanded_row_idx int32 [N * K] with
    `expanded_row_idx[row_idx sorted by expert] = arange`, and the sorted experts.

    x: [N, H], float16, bfloat16 or float32; row_idx and expert_idx: int32 [N, K], row_idx as
    npu_moe_gating_top_k_softmax gives it.
    """
    name = "npu_moe_init_routing"
    require_dtype(name, "x", x, FLOATS)
    require(x.dim() == 2, name, f"x must be [N, H], not {list(x.shape)}")
    for argument, tensor in (("row_idx", row_idx), ("expert_idx", expert_idx)):
        require_dtype(name, argument, tensor, (torch.int32,))
        require(
            tensor.dim() == 2 and tensor.shape[0] == x.shape[0],
            name,
            f"{argument} must be [N, K] with N={x.shape[0]}, not {list(tensor.shape)}",
        )
    require(row_idx.shape == expert_idx.shape, name, "row_idx and expert_idx must have one shape")
    require(active_num >= 0, name, f"active_num must not be negative, not {active_num}")
    rows, choices = expert_idx.shape
    order = expert_idx.flatten().argsort(stable=True)
    sources = row_idx.flatten()[order].long()
    require(
        torch.equal(sources.sort().values, torch.arange(rows * choices)),
        name,
        "row_idx must hold each of 0 to N * K - 1 once",
    )
    expanded_row_idx = torch.empty(rows * choices, dtype=torch.int32)
    expanded_row_idx[sources] = torch.arange(rows * choices, dtype=torch.int32)
    active = min(active_num, rows) * choices
    return x[sources[:active] % max(rows, 1)], expanded_row_idx, expert_idx.flatten()[order]


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest along the last dimension; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :k]
    return scores.gather(-1, order), order.to(torch.int32)


def _with_finished(experts: Tensor, finished: Tensor | None, none: int) -> Tensor:
    return experts if finished is None else experts.masked_fill(finished[..., None], none)


def _check(name: str, x: Tensor, finished: Tensor | None, k: int) -> None:
    require(x.dim() in (2, 3), name, f"x must be 2-D or 3-D, not {list(x.shape)}")
    require_dtype(name, "x", x, FLOATS)
    most = min(x.shape[-1], MOST_CHOICES)
    require(0 <= k <= most, name, f"k must be 0 to {most}, not {k}")
    if finished is not None:
        require_dtype(name, "finished", finished, (torch.bool,))
        require(
            finished.shape == x.shape[:-1],
            name,
            f"finished must be {list(x.shape[:-1])}, not {list(finished.shape)}",
        )


KERNELS = {
    "npu_moe_gating_top_k_softmax": Kernel(npu_moe_gating_top_k_softmax, made_contiguous=("x",)),
    "npu_moe_gating_top_k_softmax_v2": Kernel(npu_moe_gating_top_k_softmax_v2, made_contiguous=("x",)),
    "npu_moe_init_routing": Kernel(npu_moe_init_routing, made_contiguous=("x", "row_idx", "expert_idx")),
}
