"""npu_scaled_masked_softmax and its backward.

Source: torch_npu's operator documentation and op-plugin's tests: masked logits become -10000.
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, require, require_dtype, require_same_dtype
from .kernel import Kernel

MASKED = -10000.0
SHORTEST, LONGEST, STEP = 32, 4096, 32


def npu_scaled_masked_softmax(x: Tensor, mask: Tensor, scale: float = 1, fixed_triu_mask: bool = False) -> Tensor:
    """`softmax(x * scale, masked)` over the last dimension, in float32 with one rounding. x: [N, C, H, W], float16,
    bfloat16 or float32, H and W multiples of 32 from 32 to 4096; mask: bool, True = masked, broadcast to x."""
    name = "npu_scaled_masked_softmax"
    require_dtype(name, "x", x, FLOATS)
    _check(name, x, mask, fixed_triu_mask)
    return (x.float() * scale).masked_fill(mask, MASKED).softmax(-1).to(x.dtype)


def npu_scaled_masked_softmax_backward(
    y_grad: Tensor, y: Tensor, mask: Tensor, scale: float, fixed_triu_mask: bool
) -> Tensor:
    name = "npu_scaled_masked_softmax_backward"
    require_same_dtype(name, y_grad=y_grad, y=y)
    require_dtype(name, "y", y, FLOATS)
    _check(name, y, mask, fixed_triu_mask)
    wide, out = y_grad.float(), y.float()
    grad = (wide - (wide * out).sum(-1, keepdim=True)) * out * scale
    return grad.masked_fill(mask, 0.0).to(y.dtype)


def _check(name: str, x: Tensor, mask: Tensor, fixed_triu_mask: bool) -> None:
    require(not fixed_triu_mask, name, "fixed_triu_mask must be False")
    require(x.dim() == 4, name, f"x must be [N, C, H, W], not {list(x.shape)}")
    require(
        all(SHORTEST <= size <= LONGEST and size % STEP == 0 for size in x.shape[-2:]),
        name,
        f"H and W must be multiples of {STEP} from {SHORTEST} to {LONGEST}, not {list(x.shape[-2:])}",
    )
    require_dtype(name, "mask", mask, (torch.bool,))
    pairs = zip(reversed(mask.shape), reversed(x.shape), strict=False)
    require(
        mask.dim() <= 4 and all(ours in (1, theirs) for ours, theirs in pairs),
        name,
        f"mask {list(mask.shape)} must broadcast to x {list(x.shape)}",
    )


KERNELS = {
    "npu_scaled_masked_softmax": Kernel(npu_scaled_masked_softmax, made_contiguous=("x", "mask")),
    "npu_scaled_masked_softmax_backward": Kernel(npu_scaled_masked_softmax_backward, made_contiguous=("y_grad", "y")),
}
