"""Fused inference attention into given tensors, and what torch_npu's graphs ask for before they capture it: the size of
its workspace, and tensors for its results.

Source: torch_npu's operator documentation and its handlers of graphs. The two companions launch no kernel.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..refusal import given, require, require_contiguous
from .attention_inference import npu_fused_infer_attention_score, npu_fused_infer_attention_score_v2
from .kernel import Kernel

WORKSPACE = 512
"""Elements. A device's depends on the shapes; nothing here uses it."""


def into(attention: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The operator with `out=[attention, lse]`."""
    name = f"{attention.__name__}.out"

    def formula(
        query: Tensor, key: Tensor, value: Tensor, *, workspace: Tensor | None, out: list[Tensor], **options: Any
    ) -> tuple[Tensor, Tensor]:
        require(len(out) == 2, name, f"out must be [attention, lse], not {len(out)} tensors")
        if workspace is not None:
            size = workspace.numel() * workspace.element_size()
            needed = WORKSPACE * query.element_size()
            require(size >= needed, name, f"workspace must have the {needed} bytes that were asked for, not {size}")
        results = attention(query, key, value, **options)
        for argument, result, given_out in zip(("attention", "lse"), results, out, strict=True):
            if argument == "lse" and not result.numel():
                continue
            require_contiguous(name, f"out's {argument}", given_out)
            require(
                given_out.shape == result.shape and given_out.dtype == result.dtype,
                name,
                f"out's {argument} must be {list(result.shape)} in {result.dtype}, not {list(given_out.shape)} in "
                f"{given_out.dtype}",
            )
            given_out.copy_(result)
        return out[0], out[1]

    return formula


def max_workspace(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=query.dtype)


def infer_output(query: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Unwritten tensors for the results; lse [1] where it is not asked for."""
    name = "_npu_fused_infer_attention_score_infer_output"
    layout, heads = options["input_layout"], options.get("num_heads") or options["num_query_heads"]
    for argument in ("quant_scale2", "quant_scale_out", "query_rope", "query_dtype", "value_dtype", "out_dtype"):
        require(options.get(argument) is None, name, f"{argument} is not simulated")
    shape = list(query.shape)
    if options["block_table"] is None:
        key_heads = options["num_key_value_heads"] or heads
        shape[-1] = value.shape[-1] if layout != "BSH" else value.shape[-1] // key_heads * heads
    length = {"BNSD": 2, "BNSD_BSND": 2, "TND": 0}.get(layout, 1)
    rows = query.shape[length]
    if layout == "BNSD_BSND":
        shape = [shape[0], shape[2], shape[1], shape[3]]
    lse = [1]
    if options.get("softmax_lse_flag", options.get("return_softmax_lse")):
        heads = given(heads, name, "num_heads must be given")
        lse = [rows, heads, 1] if layout == "TND" else [query.shape[0], heads, rows, 1]
    return torch.full(shape, torch.nan, dtype=query.dtype), torch.full(lse, torch.nan)


OUT = ("workspace", "out")
KERNELS = {
    "npu_fused_infer_attention_score.out": Kernel(into(npu_fused_infer_attention_score), only_written=OUT),
    "npu_fused_infer_attention_score_v2.out": Kernel(into(npu_fused_infer_attention_score_v2), only_written=OUT),
    "_npu_fused_infer_attention_score_get_max_workspace": Kernel(max_workspace, launches=False),
    "_npu_fused_infer_attention_score_v2_get_max_workspace": Kernel(max_workspace, launches=False),
    "_npu_fused_infer_attention_score_infer_output": Kernel(infer_output, launches=False),
    "_npu_fused_infer_attention_score_v2_infer_output": Kernel(infer_output, launches=False),
}
