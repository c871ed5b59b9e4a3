"""Gated activations on one tensor that holds both halves: npu_swiglu, npu_geglu and their backward.

Source: torch_npu's operator documentation and the CANN kernels (ops-nn, swi_glu, ge_glu_v2).
"""

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from ..refusal import FLOATS, require, require_contiguous, require_dtype, require_not_empty, require_same_dtype
from .kernel import Kernel


def npu_swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """`silu(a) * b` with `a, b = input.chunk(2, dim)`, in float32 with one rounding at the end.

    input: 1 to 8 dimensions, float16, bfloat16 or float32, contiguous, not empty, even along dim.
    """
    _check("npu_swiglu", input, dim)
    a, b = input.float().chunk(2, dim)
    return (silu(a) * b).to(input.dtype)


def npu_swiglu_backward(grad_output: Tensor, input: Tensor, dim: int = -1) -> Tensor:
    """The gradient of npu_swiglu, both halves concatenated along dim, in float32 with one rounding."""
    name = "npu_swiglu_backward"
    _check(name, input, dim)
    require_same_dtype(name, grad_output=grad_output, input=input)
    a, b = input.float().chunk(2, dim)
    require(grad_output.shape == a.shape, name, f"grad_output {list(grad_output.shape)} must be {list(a.shape)}")
    grad, gate = grad_output.float(), torch.sigmoid(a)
    return torch.cat((grad * b * gate * (1 + a * (1 - gate)), grad * a * gate), dim).to(input.dtype)


def npu_geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    """`gelu(half) * other half`; the right half is activated unless `activate_left`.

    approximate: 1 is tanh, 0 is erf. Returns the product and gelu(half), which geglu's backward takes.
    """
    _check("npu_geglu", input, dim, contiguous=False)
    activated, other = _geglu_halves(input, dim, activate_left)
    value = gelu(activated, approximate=_approximation("npu_geglu", approximate))
    return (value * other).to(input.dtype), value.to(input.dtype)


def npu_geglu_grad(
    grad_output: Tensor,
    input: Tensor,
    gelu: Tensor,
    dim: int = -1,
    approximate: int = 1,
    activate_left: bool = False,
) -> Tensor:
    """The gradient of npu_geglu's first output; `gelu` is its second output."""
    name = "npu_geglu_grad"
    _check(name, input, dim, contiguous=False)
    activated, other = _geglu_halves(input, dim, activate_left)
    grad = grad_output.float()
    by_activated = torch.ops.aten.gelu_backward(grad * other, activated, approximate=_approximation(name, approximate))
    by_other = grad * gelu.float()
    halves = (by_activated, by_other) if activate_left else (by_other, by_activated)
    return torch.cat(halves, dim).to(input.dtype)


def _geglu_halves(input: Tensor, dim: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    left, right = input.float().chunk(2, dim)
    return (left, right) if activate_left else (right, left)


def _approximation(name: str, approximate: int) -> str:
    require(approximate in (0, 1), name, f"approximate must be 0 (erf) or 1 (tanh), not {approximate}")
    return "tanh" if approximate else "none"


def _check(name: str, input: Tensor, dim: int, contiguous: bool = True) -> None:
    require_dtype(name, "input", input, FLOATS)
    require(1 <= input.dim() <= 8, name, f"input must have 1 to 8 dimensions, not {input.dim()}")
    require(-input.dim() <= dim < input.dim(), name, f"dim {dim} is out of range for shape {list(input.shape)}")
    require(input.shape[dim] % 2 == 0, name, f"size({dim}) must be even, not {input.shape[dim]}")
    require_not_empty(name, "input", input)
    if contiguous:
        require_contiguous(name, "input", input)


KERNELS = {
    "npu_swiglu": Kernel(npu_swiglu),
    "npu_swiglu_backward": Kernel(npu_swiglu_backward, made_contiguous=("grad_output",)),
    "npu_geglu": Kernel(npu_geglu, made_contiguous=("input",)),
    "npu_geglu_grad": Kernel(npu_geglu_grad, made_contiguous=("grad_output", "input", "gelu")),
}
