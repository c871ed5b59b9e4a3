"""npu_apply_rotary_pos_emb: rotary embedding of query and key at once, in place, for inference.

Source: torch_npu's operator documentation and op-plugin (ApplyRotaryPosEmbNpuOpApi.cpp). torch_npu raises in backward.
"""

from torch import Tensor

from ..refusal import FLOATS, require, require_contiguous, require_dtype, require_not_empty, require_same_dtype
from .kernel import Kernel
from .rotary import rotated

LAYOUTS = {"BSND": 4, "BSH": 4, "TND": 3}  # BSH, the default up to torch_npu 2.9, means BSND
WIDTHS = (64, 128)


def npu_apply_rotary_pos_emb(
    query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, layout: str = "BSND", rotary_mode: str = "half"
) -> tuple[Tensor, Tensor]:
    """`x * cos + rotated(x) * sin` for query and key, which are changed and returned; in float32 with one rounding.

    query, key: [B, S, N, D], or [T, N, D] in TND; D 64 or 128; cos, sin: [B, S, 1, D] or [T, 1, D], not broadcast. One
    dtype of float16, bfloat16, float32; contiguous, not empty. Only these layouts and rotary_mode "half" on A2 and A3.
    """
    name = "npu_apply_rotary_pos_emb"
    require(layout in LAYOUTS, name, f"layout must be BSND or TND on A2/A3, not {layout!r}")
    require(rotary_mode == "half", name, f"rotary_mode must be half on A2/A3, not {rotary_mode!r}")
    require_same_dtype(name, query=query, key=key, cos=cos, sin=sin)
    require_dtype(name, "query", query, FLOATS)
    for argument, tensor in (("query", query), ("key", key), ("cos", cos), ("sin", sin)):
        require(
            tensor.dim() == LAYOUTS[layout],
            name,
            f"{argument} must be {LAYOUTS[layout]}-D in {layout}, not {list(tensor.shape)}",
        )
        require_not_empty(name, argument, tensor)
        require_contiguous(name, argument, tensor)
        heads = 1 if argument in ("cos", "sin") else tensor.shape[-2]
        expected = (*query.shape[:-2], heads, query.shape[-1])
        require(tensor.shape == expected, name, f"{argument} must be {list(expected)}, not {list(tensor.shape)}")
    require(query.shape[-1] in WIDTHS, name, f"D must be 64 or 128, not {query.shape[-1]}")
    for tensor in (query, key):
        wide = tensor.float()
        tensor.copy_(wide * cos.float() + rotated(wide, "half") * sin.float())
    return query, key


KERNELS = {"npu_apply_rotary_pos_emb": Kernel(npu_apply_rotary_pos_emb)}
