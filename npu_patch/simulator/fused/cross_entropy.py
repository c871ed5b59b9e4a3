"""Cross entropy: npu_cross_entropy_loss and its backward.

Source: torch_npu's operator documentation and the CANN kernels (ops-nn, cross_entropy_loss). Not supported by the
documented operator, and refused: zloss; targets outside [0, C), -100 among them, unless ignore_index >= 0 names them.
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, require, require_dtype, require_same_dtype
from .kernel import Kernel

MOST_ROWS = 200000


def npu_cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
    return_zloss: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss, log_prob, and two empty tensors. input: [N, C], float16, bfloat16 or float32; target: int64 [N] in [0, C);
    weight: float32 [C]. An ignore_index below 0 ignores nothing. loss is [1], or [N] without reduction, and log_prob
    [N, C]: computed in float32, rounded once to input's dtype."""
    name = "npu_cross_entropy_loss"
    require(not return_zloss and lse_square_scale_for_zloss == 0, name, "zloss is not supported yet")
    require(input.dim() == 2 and input.numel() > 0, name, f"input must be [N, C], not {list(input.shape)}")
    require(input.shape[0] <= MOST_ROWS, name, f"N must be at most {MOST_ROWS}, not {input.shape[0]}")
    require_dtype(name, "input", input, FLOATS)
    require(0 <= label_smoothing < 1, name, f"label_smoothing must be in [0, 1), not {label_smoothing}")
    kept = _check(name, input, target, weight, reduction, ignore_index)
    log_prob = input.float().log_softmax(-1)
    each = torch.ones(input.shape[1]) if weight is None else weight
    picked = each[target] * kept
    losses = -log_prob.gather(1, target[:, None]).squeeze(1) * picked
    if label_smoothing:
        smooth = -(log_prob * each).sum(-1) * kept
        losses = (1 - label_smoothing) * losses + label_smoothing / input.shape[1] * smooth
    if reduction != "none":
        losses = losses.sum().reshape(1)
    if reduction == "mean":
        losses = losses / picked.sum()
    empty = input.new_empty(0)
    return losses.to(input.dtype), log_prob.to(input.dtype), empty, empty.clone()


def npu_cross_entropy_loss_backward(
    grad_loss: Tensor,
    log_prob: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    grad_zloss: Tensor | None = None,
    lse_for_zloss: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    lse_square_scale_for_zloss: float = 0.0,
) -> Tensor:
    """The gradient of input, from the rounded log_prob. Only the defaults of label_smoothing and, for "mean", of weight
    and ignore_index are supported."""
    name = "npu_cross_entropy_loss_backward"
    require_same_dtype(name, grad_loss=grad_loss, log_prob=log_prob)
    require(
        label_smoothing == 0, name, f"label_smoothing must be 0 where input needs a gradient, not {label_smoothing}"
    )
    require(
        reduction != "mean" or (weight is None and ignore_index == -100),
        name,
        "weight and ignore_index must be left out where input needs a gradient and reduction is mean",
    )
    kept = _check(name, log_prob, target, weight, reduction, ignore_index)
    expected = [log_prob.shape[0]] if reduction == "none" else [1]
    require(list(grad_loss.shape) == expected, name, f"grad_loss must be {expected}, not {list(grad_loss.shape)}")
    each = torch.ones(log_prob.shape[1]) if weight is None else weight
    factor = grad_loss.float() * each[target] * kept
    if reduction == "mean":
        factor = factor / log_prob.shape[0]
    grad = log_prob.float().exp()
    grad[torch.arange(len(target)), target] -= 1
    return (grad * factor[:, None]).to(log_prob.dtype)


def _check(
    name: str, input: Tensor, target: Tensor, weight: Tensor | None, reduction: str, ignore_index: int
) -> Tensor:
    """Which rows count, float32 [N]."""
    rows, classes = input.shape
    require(reduction in ("mean", "sum", "none"), name, f"reduction must be mean, sum or none, not {reduction!r}")
    require(ignore_index < classes, name, f"ignore_index must be below C={classes}, not {ignore_index}")
    require_dtype(name, "target", target, (torch.int64,))
    require(list(target.shape) == [rows], name, f"target must be [N] = [{rows}], not {list(target.shape)}")
    outside = target[(target < 0) | (target >= classes)]
    require(
        not outside.numel(),
        name,
        f"target must be in [0, {classes}), not {outside[:1].tolist()} (an ignore_index below 0 ignores nothing)",
    )
    if weight is not None:
        require_dtype(name, "weight", weight, (torch.float32,))
        require(list(weight.shape) == [classes], name, f"weight must be [C] = [{classes}], not {list(weight.shape)}")
    return (target != ignore_index).float()


KERNELS = {
    "npu_cross_entropy_loss": Kernel(npu_cross_entropy_loss, made_contiguous=("input",)),
    "npu_cross_entropy_loss_backward": Kernel(npu_cross_entropy_loss_backward, made_contiguous=("log_prob",)),
}
