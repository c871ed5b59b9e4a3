"""npu_ring_attention_update: two attention results over different keys, merged into the one over both.

Source: torch_npu's operator documentation.
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, require, require_dtype
from .kernel import Kernel

NAME = "npu_ring_attention_update"
COPIES = 8  # of each row's maximum and sum


def npu_ring_attention_update(
    prev_attn_out: Tensor,
    prev_softmax_max: Tensor,
    prev_softmax_sum: Tensor,
    cur_attn_out: Tensor,
    cur_softmax_max: Tensor,
    cur_softmax_sum: Tensor,
    *,
    actual_seq_qlen: Tensor | None = None,
    input_layout: str = "SBH",
    input_softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    """attn_out `[S, B, N * D]` in float16, bfloat16 or float32; softmax_max and softmax_sum `[B, N, S, 8]`, float32."""
    require(input_layout == "SBH", NAME, f"only input_layout SBH is simulated, not {input_layout}")
    require_dtype(NAME, "prev_attn_out", prev_attn_out, FLOATS)
    require(prev_attn_out.dim() == 3, NAME, f"prev_attn_out must be [S, B, N * D], not {list(prev_attn_out.shape)}")
    require(
        cur_attn_out.shape == prev_attn_out.shape and cur_attn_out.dtype == prev_attn_out.dtype,
        NAME,
        f"cur_attn_out must have the shape and dtype of prev_attn_out, {list(prev_attn_out.shape)}",
    )
    length, batch, hidden = prev_attn_out.shape
    statistics = (prev_softmax_max, prev_softmax_sum, cur_softmax_max, cur_softmax_sum)
    heads = prev_softmax_max.shape[1]
    for each in statistics:
        require_dtype(NAME, "softmax_max and softmax_sum", each, (torch.float32,))
        require(
            each.shape == (batch, heads, length, COPIES),
            NAME,
            f"softmax_max and softmax_sum must be [B, N, S, {COPIES}], not {list(each.shape)}",
        )
    require(hidden % heads == 0, NAME, f"the last size of attn_out, {hidden}, must be a multiple of N, {heads}")

    highest = torch.maximum(prev_softmax_max, cur_softmax_max)
    before = prev_softmax_sum * torch.exp(prev_softmax_max - highest)
    now = cur_softmax_sum * torch.exp(cur_softmax_max - highest)
    total = before + now

    def weighted(attn_out: Tensor, part: Tensor) -> Tensor:
        share = (part / total)[..., :1].permute(2, 0, 1, 3)  # [S, B, N, 1]
        return attn_out.float().view(length, batch, heads, hidden // heads) * share

    merged = weighted(prev_attn_out, before) + weighted(cur_attn_out, now)
    return merged.view(length, batch, hidden).to(prev_attn_out.dtype), highest, total


KERNELS = {NAME: Kernel(npu_ring_attention_update, made_contiguous=("prev_attn_out", "cur_attn_out"))}
