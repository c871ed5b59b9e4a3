"""Rotary position embedding: npu_rotary_mul and its backward.

Source: torch_npu's operator documentation and the CANN kernels' tiling (ops-transformer, rotary_position_embedding:
rope_rotate_half_tiling.cpp, CheckBnsdBlockSkip; rope_half_grad_tiling.cpp, RopeHalfGradSelectLayout).
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, given, require, require_dtype, require_same_dtype
from .kernel import Kernel

# Ascend910B3, the SoC that cann_stub.c names: 20 cube cores with two vector cores each.
VECTOR_CORES = 40

# Shapes of cos that the operator recognises in half mode, as which dimension of a 4-D x they follow ("x") and which
# they broadcast ("1"). The operator infers the layout of x from them.
HALF_LAYOUTS = {
    "11x": "BNSD with cos [1,1,S,D]",
    "x1x": "BNSD with cos [B,1,S,D]",
    "xxx": "BNSD with cos [B,N,S,D]",
    "1x1": "BSND with cos [1,S,1,D]",
    "xx1": "BSND with cos [B,S,1,D], or SBND with cos [S,B,1,D]",
    "x11": "SBND with cos [S,1,1,D]",
}
INTERLEAVE_LAYOUTS = {key: HALF_LAYOUTS[key] for key in ("11x", "1x1", "x11")}
# 3-D x is TND.
TND_LAYOUTS = {"x1": "TND with cos [T,1,D]", "xx": "TND with cos [T,N,D]"}


def npu_rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """`input * cos + rotated(input) * sin` with cos = r1, sin = r2, in float32 with one rounding at the end.

    input: float16, bfloat16 or float32; 4-D, or 3-D (TND); its last dimension D even and at most 896. r1, r2: D wide,
    one shape out of `HALF_LAYOUTS` or `TND_LAYOUTS`; they are rounded to input's dtype first. rotary_mode "half":
    rotated = cat(-x2, x1); "interleave": rotated pairs (-x[1::2], x[::2]). Returns input's shape and dtype.
    """
    name = "npu_rotary_mul"
    require(rotate is None, name, "the rotate matrix is not simulated")
    layout = _check(name, input, r1, r2, rotary_mode)
    if layout == "11x":
        _check_block_skip(name, input, rotary_mode)
    cos, sin = r1.to(input.dtype).float(), r2.to(input.dtype).float()
    wide = input.float()
    return (wide * cos + rotated(wide, rotary_mode) * sin).to(input.dtype)


def npu_rotary_mul_backward(
    grad: Tensor,
    input: Tensor,
    r1: Tensor,
    r2: Tensor,
    rotary_mode: str = "half",
    *,
    r1_requires_grad: bool = False,
    r2_requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of npu_rotary_mul: dx, dcos, dsin, all of grad's dtype; dcos and dsin have the shape of r1 and r2.

    dcos and dsin are left unwritten (NaN here) unless r1 or r2 requires a gradient. The layout rules are not the
    forward's: see `backward_layout`.
    """
    name = "npu_rotary_mul_backward"
    require_same_dtype(name, grad=grad, input=input)
    require(grad.shape == input.shape, name, f"grad {list(grad.shape)} must have input's shape {list(input.shape)}")
    layout = _check(name, input, r1, r2, rotary_mode)
    batch, heads = _batch_and_heads(layout, input)
    if rotary_mode == "half":
        found = given(
            backward_layout(input, r1),
            name,
            f"r1 {list(r1.shape)} fits no layout of input {list(input.shape)} in backward: BNSD with cos [B,1,S,D] "
            "needs B < S",
        )
        batch, heads = (input.shape[axis] for axis in found) if input.dim() == 4 else (batch, heads)
    cos, sin = r1.to(input.dtype).float(), r2.to(input.dtype).float()
    wide = grad.float()
    dx = (wide * cos + _rotated_back(wide * sin, rotary_mode)).to(input.dtype)
    if not (r1_requires_grad or r2_requires_grad):
        unwritten = torch.full(r1.shape, torch.nan, dtype=input.dtype)
        return dx, unwritten, unwritten.clone()
    require(batch * heads <= 1024, name, f"gradients of r1 and r2 need B*N <= 1024, not {batch}*{heads}")
    x = input.float()
    dcos = (wide * x).sum_to_size(r1.shape).to(input.dtype)
    dsin = (wide * rotated(x, rotary_mode)).sum_to_size(r2.shape).to(input.dtype)
    return dx, dcos, dsin


def rotated(x: Tensor, mode: str) -> Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat((-second, first), -1)
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def _rotated_back(x: Tensor, mode: str) -> Tensor:
    """The transpose of `rotated`."""
    return -rotated(x, mode)


def _check(name: str, input: Tensor, r1: Tensor, r2: Tensor, mode: str) -> str:
    """The layout, as a key of the tables above."""
    require_dtype(name, "input", input, FLOATS)
    require_dtype(name, "r1", r1, FLOATS)
    require_dtype(name, "r2", r2, FLOATS)
    require(
        mode in ("half", "interleave"),
        name,
        f"The rotary_mode of {name} should be half or interleave, but got {mode!r} (on A2/A3)",
    )
    require(input.dim() in (3, 4), name, f"input must be 4-D, or 3-D (TND), not {input.dim()}-D")
    require(input.numel() > 0, name, f"input must not be empty (shape {list(input.shape)})")
    width = input.shape[-1]
    require(width % 2 == 0 and width <= 896, name, f"D must be even and at most 896, not {width}")
    require(r1.shape == r2.shape, name, f"r1 {list(r1.shape)} and r2 {list(r2.shape)} must have one shape")
    require(
        r1.dim() == input.dim() and r1.shape[-1] == width,
        name,
        f"r1 {list(r1.shape)} must have the rank and last dimension of input {list(input.shape)}",
    )
    if input.dim() == 3:
        tables = {"x1": TND_LAYOUTS["x1"]} if mode == "interleave" else TND_LAYOUTS
    else:
        tables = INTERLEAVE_LAYOUTS if mode == "interleave" else HALF_LAYOUTS
    layout = given(
        _layout(input, r1, tuple(tables)),
        name,
        f"r1 {list(r1.shape)} fits no supported layout of input {list(input.shape)} in {mode} mode: "
        + "; ".join(tables.values()),
    )
    batch, heads = _batch_and_heads(layout, input)
    require(batch < 1000 and heads < 1000, name, f"B and N must be below 1000, not B={batch}, N={heads}")
    if mode == "interleave":
        require(batch * heads < 1000, name, f"interleave mode needs B*N < 1000, not {batch * heads}")
    return layout


def _layout(x: Tensor, cos: Tensor, layouts: tuple[str, ...]) -> str | None:
    """The first of `layouts` that the shapes fit."""
    sizes = list(zip(x.shape[:-1], cos.shape[:-1], strict=True))
    for layout in layouts:
        if all(c == (x_size if kind == "x" else 1) for kind, (x_size, c) in zip(layout, sizes, strict=True)):
            return layout
    return None


def _batch_and_heads(layout: str, x: Tensor) -> tuple[int, int]:
    if x.dim() == 3:
        return 1, x.shape[1]
    if layout in ("11x", "x1x", "xxx"):
        return x.shape[0], x.shape[1]
    if layout == "x11":
        return x.shape[1], x.shape[2]
    return min(x.shape[0], x.shape[1]) if layout == "xx1" else x.shape[0], x.shape[2]


def _check_block_skip(name: str, x: Tensor, mode: str) -> None:
    """BNSD with cos [1,1,S,D]: the half-mode kernel jumps from block to block and its tiling gives up on short S."""
    batch, heads, length, width = x.shape
    if mode != "half" or 1 in (batch, heads, length):  # other tilings
        return
    aligned = (width // 2) % (32 // x.element_size()) == 0
    if aligned:
        require(
            batch * heads <= 8 * length,
            name,
            f"BNSD with cos [1,1,S,D] needs B*N <= 8*S, not {batch}*{heads} with S={length}: "
            "please do not use RotaryPositionEmbedding fusion operator",
        )
    elif width < 80:
        per_core = -(-length // VECTOR_CORES)
        require(
            2 * batch * heads <= per_core,
            name,
            f"BNSD with cos [1,1,S,D] and D={width} (D/2 not a multiple of 32 bytes, D < 80) needs 2*B*N <= "
            f"ceil(S/{VECTOR_CORES}), not 2*{batch}*{heads} with S={length}: "
            "please do not use RotaryPositionEmbedding fusion operator",
        )


def backward_layout(x: Tensor, cos: Tensor) -> tuple[int, int] | None:
    """The dimensions of a 4-D x (3-D x is a batch of one) that backward in half mode takes for B and N; None where the
    shapes fit no layout. The first that fits is taken, so [B,S,N,D] with cos [B,S,1,D] and B >= S is SBND there."""
    (first, second, third), (c0, c1, c2) = _four_dimensional(x), _four_dimensional(cos)
    if (first, second, third) == (c0, c1, c2):
        return 0, 2
    if first != 1 and c0 == 1 and second == c1 and c2 == 1:  # BSND, cos [1,S,1,D]
        return 0, 2
    if first == c0 and second == c1 and c2 == 1 and first < second:  # BSND, cos [B,S,1,D]
        return 0, 2
    if first != 1 and c0 == 1 and c1 == 1 and third == c2:  # BNSD, cos [1,1,S,D]
        return 0, 1
    if first == c0 and c1 == 1 and third == c2 and first < third:  # BNSD, cos [B,1,S,D]
        return 0, 1
    if first == c0 and c2 == 1 and (second == c1 or (c1 == 1 and second != 1)):  # SBND, cos [S,B,1,D] or [S,1,1,D]
        return 1, 2
    return None


def _four_dimensional(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[:-1]) if tensor.dim() == 4 else (1, *tensor.shape[:-1])


KERNELS = {
    "npu_rotary_mul": Kernel(npu_rotary_mul, made_contiguous=("input", "r1", "r2")),
    "npu_rotary_mul_backward": Kernel(
        npu_rotary_mul_backward,
        made_contiguous=("grad", "input", "r1", "r2"),
        needs_gradient=("r1", "r2"),
    ),
}
