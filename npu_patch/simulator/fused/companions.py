"""Unfused operators of the npu namespace that torch_npu's own aten kernels and derivatives call.

`softmax(dtype=...)` casts through npu_dtype_cast, `repeat_interleave` and `l1_loss` have their own backward operators,
and so on. They compute what their aten relatives compute.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .kernel import Kernel

# c10::ScalarType, as the operators with an integer dtype argument take it.
SCALAR_TYPES = {
    0: torch.uint8,
    1: torch.int8,
    2: torch.int16,
    3: torch.int32,
    4: torch.int64,
    5: torch.float16,
    6: torch.float32,
    7: torch.float64,
    9: torch.complex64,
    10: torch.complex128,
    11: torch.bool,
    15: torch.bfloat16,
}


def dtype_cast(input: Tensor, dtype: torch.dtype | int, *unused: object) -> Tensor:
    """`input.to(dtype)`, always a copy."""
    target = SCALAR_TYPES[dtype] if isinstance(dtype, int) else dtype
    return input.to(target, copy=True)


def npu_broadcast(input: Tensor, size: list[int]) -> Tensor:
    """`input.expand(size)`, written out."""
    return input.expand(size).contiguous()


def npu_transpose(input: Tensor, perm: list[int], require_contiguous: bool = True) -> Tensor:
    return input.permute(perm).contiguous()


def npu_confusion_transpose(input: Tensor, perm: list[int], shape: list[int], transpose_first: bool) -> Tensor:
    """`permute(perm)` and `reshape(shape)`, in the order that transpose_first says."""
    if transpose_first:
        return input.permute(perm).reshape(shape)
    return input.reshape(shape).permute(perm).contiguous()


def npu_confusion_transpose_backward(grad: Tensor, perm: list[int], shape: list[int], transpose_first: bool) -> Tensor:
    """The inverse, for an input of `shape`; transpose_first is the opposite of forward's."""
    back = [perm.index(axis) for axis in range(len(perm))]
    if transpose_first:
        return grad.permute(back).reshape(shape)
    return grad.reshape([shape[axis] for axis in perm]).permute(back).contiguous()


def repeat_interleave_backward(grad: Tensor, input: Tensor, repeats: Tensor | int, dim: int | None = None) -> Tensor:
    """The sum of grad over the copies of each element of input; dim None is the flattened input."""
    source, axis = (input.flatten(), 0) if dim is None else (input, dim)
    counts = repeats if isinstance(repeats, Tensor) else torch.tensor([repeats])
    counts = counts.expand(source.shape[axis])
    index = torch.arange(source.shape[axis]).repeat_interleave(counts)
    return torch.zeros_like(source).index_add(axis, index, grad).view(input.shape)


def l1_loss_backward(grad_output: Tensor, input: Tensor, target: Tensor, reduction: int) -> Tensor:
    grad = grad_output * (input - target).sign()
    return grad / input.numel() if reduction == 1 else grad


def kl_div_backward(
    grad_output: Tensor, input: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False
) -> Tensor:
    grad = -grad_output * (target.exp() if log_target else target)
    grad = grad.expand(input.shape)
    return grad / input.numel() if reduction == 1 else grad.contiguous()


def kl_div_target_backward(
    grad_output: Tensor, self: Tensor, target: Tensor, reduction: int = 1, *, log_target: bool = False
) -> Tensor:
    by_target = target.exp() * (target + 1 - self) if log_target else target.log() + 1 - self
    if not log_target:
        by_target = by_target.masked_fill(target == 0, 0.0)
    grad = by_target * grad_output
    return grad / self.numel() if reduction == 1 else grad


def binary_cross_entropy_with_logits_backward(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    reduction: int = 1,
) -> Tensor:
    if pos_weight is None:
        grad = torch.sigmoid(input) - target
    else:
        positive = pos_weight * target
        grad = (positive + 1 - target) * torch.sigmoid(input) - positive
    if weight is not None:
        grad = grad * weight
    grad = grad * grad_output
    return grad / input.numel() if reduction == 1 else grad


def npu_renorm_backward(grad: Tensor, input: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    """The gradient of `input.renorm(p, dim, maxnorm)`, which divides by the norm plus 1e-7."""
    others = [axis for axis in range(input.dim()) if axis != dim % input.dim()]
    x, wide = input.float(), grad.float()
    norm = torch.linalg.vector_norm(x, p, others, keepdim=True)
    along = (x * wide).sum(others, keepdim=True)
    if p == float("inf"):
        largest = x.abs() == norm
        by_norm = x.sgn() * largest * along / largest.sum(others, keepdim=True)
    elif p == 0:
        by_norm = torch.zeros_like(x)
    else:
        by_norm = (x.sgn() * x.abs().pow(p - 1)).masked_fill(x == 0, 0.0) * along / norm.pow(p - 1)
    scale = 1 / (norm + 1e-7)
    return torch.where(norm > maxnorm, maxnorm * scale * (wide - scale * by_norm), wide).to(input.dtype)


def npu_silu_backward(grad_output: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(grad_output, x0)


def npu_gelu(input: Tensor, *, approximate: str = "none") -> Tensor:
    return functional.gelu(input, approximate=approximate)


def npu_gelu_backward(grad_output: Tensor, input: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.ops.aten.gelu_backward(grad_output, input, approximate=approximate)


def fast_gelu(input: Tensor) -> Tensor:
    """`x * sigmoid(1.702 * x)`."""
    wide = input.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(input.dtype)


def fast_gelu_backward(grad: Tensor, input: Tensor) -> Tensor:
    wide = input.float()
    gate = torch.sigmoid(1.702 * wide)
    return (grad.float() * (gate + wide * 1.702 * gate * (1 - gate))).to(input.dtype)


def npu_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(input, weight, bias)


def npu_linear_backward(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return grad @ weight, grad.mT @ input


def npu_one_hot(
    input: Tensor, num_classes: int = -1, depth: int = 1, on_value: float = 1, off_value: float = 0
) -> Tensor:
    hot = functional.one_hot(input.long(), depth)
    return torch.where(hot.bool(), on_value, off_value).to(input.dtype)


def one_(input: Tensor) -> Tensor:
    return input.fill_(1)


def amp_foreach_non_finite_check(scaled_grads: list[Tensor]) -> bool:
    """Whether any gradient has an infinity or NaN."""
    return any(not bool(torch.isfinite(grad).all()) for grad in scaled_grads)


KERNELS = {
    "npu_dtype_cast": Kernel(dtype_cast),
    "_npu_dtype_cast": Kernel(dtype_cast),
    "npu_dtype_cast_backward": Kernel(dtype_cast),
    "_npu_dtype_cast_backward": Kernel(dtype_cast),
    "npu_broadcast": Kernel(npu_broadcast),
    "npu_transpose": Kernel(npu_transpose),
    "npu_confusion_transpose": Kernel(npu_confusion_transpose),
    "npu_confusion_transpose_backward": Kernel(npu_confusion_transpose_backward),
    "repeat_interleave_backward_int": Kernel(repeat_interleave_backward),
    "repeat_interleave_backward_tensor": Kernel(repeat_interleave_backward),
    "l1_loss_backward": Kernel(l1_loss_backward),
    "kl_div_backward": Kernel(kl_div_backward),
    "kl_div_target_backward": Kernel(kl_div_target_backward),
    "npu_binary_cross_entropy_with_logits_backward": Kernel(binary_cross_entropy_with_logits_backward),
    "npu_renorm_backward": Kernel(npu_renorm_backward),
    "npu_silu": Kernel(functional.silu),
    "npu_silu_backward": Kernel(npu_silu_backward),
    "npu_gelu": Kernel(npu_gelu),
    "npu_gelu_backward": Kernel(npu_gelu_backward),
    "fast_gelu": Kernel(fast_gelu),
    "npu_fast_gelu": Kernel(fast_gelu),
    "npu_fast_gelu_backward": Kernel(fast_gelu_backward),
    "npu_linear": Kernel(npu_linear),
    "npu_linear_backward": Kernel(npu_linear_backward),
    "npu_one_hot": Kernel(npu_one_hot),
    "one_": Kernel(one_),
    "_amp_foreach_non_finite_check": Kernel(amp_foreach_non_finite_check),
}
