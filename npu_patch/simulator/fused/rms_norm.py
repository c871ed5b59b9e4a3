"""RMS normalisation: npu_rms_norm, its backward, npu_add_rms_norm, npu_gemma_rms_norm.

Source: torch_npu's operator documentation and the CANN kernels (ops-nn, rms_norm).
"""

import torch
from torch import Tensor

from ..refusal import FLOATS, HALF, require, require_contiguous, require_dtype, require_not_empty, require_same_dtype
from .kernel import Kernel


def npu_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`y = input * rsqrt(mean(input**2) + epsilon) * gamma`, in float32 with one rounding at the end.

    input: 1 to 8 dimensions, float16, bfloat16 or float32. gamma: the trailing dimensions of input, which are the ones
    that are normalised; the same dtype, or float32 with a half input. Returns y with the shape and dtype of input, and
    rstd in float32 with those dimensions 1.
    """
    _check(input, gamma, "npu_rms_norm")
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(_normalised(gamma), keepdim=True) + epsilon)
    return (wide * rstd * gamma.float()).to(input.dtype), rstd


def npu_rms_norm_backward(dy: Tensor, input: Tensor, gamma: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of npu_rms_norm, both always computed: dx in input's dtype, dgamma in float32 whatever gamma is."""
    name = "npu_rms_norm_backward"
    _check(input, gamma, name)
    require(dy.shape == input.shape, name, f"dy {list(dy.shape)} must have the shape of input {list(input.shape)}")
    require_same_dtype(name, dy=dy, input=input)
    require_dtype(name, "rstd", rstd, (torch.float32,))
    wide, grad = input.float(), dy.float()
    normalised = wide * rstd
    scaled = grad * gamma.float()
    dx = (scaled - normalised * (scaled * normalised).mean(_normalised(gamma), keepdim=True)) * rstd
    dgamma = (grad * normalised).reshape(-1, *gamma.shape).sum(0)
    return dx.to(input.dtype), dgamma


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """`x = x1 + x2`, then RMS normalisation with two roundings: of x * rstd, and of the product with gamma.

    x1, x2, gamma: one dtype of float16, bfloat16, float32; x1 and x2 of one shape. Returns y, rstd (float32), x.
    In float16 the sum is rounded before it is normalised, in bfloat16 the unrounded sum is.
    """
    name = "npu_add_rms_norm"
    require_same_dtype(name, x1=x1, x2=x2, gamma=gamma)
    require(x1.shape == x2.shape, name, f"x1 {list(x1.shape)} and x2 {list(x2.shape)} must have one shape")
    require_not_empty(name, "x1", x1)
    _check(x1, gamma, name)
    dtype = x1.dtype
    x = x1 + x2 if dtype == torch.float16 else (x1.float() + x2.float()).to(dtype)
    wide = x.float() if dtype == torch.float16 else x1.float() + x2.float()
    rstd = torch.rsqrt(wide.square().mean(_normalised(gamma), keepdim=True) + epsilon)
    normalised = (wide * rstd).to(dtype)
    return (normalised.float() * gamma.float()).to(dtype), rstd, x


def npu_gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """`y = input * rstd * (1 + gamma)`, in float32 with one rounding. One dtype, contiguous, not empty."""
    name = "npu_gemma_rms_norm"
    require_same_dtype(name, input=input, gamma=gamma)
    for argument, tensor in (("input", input), ("gamma", gamma)):
        require_contiguous(name, argument, tensor)
        require_not_empty(name, argument, tensor)
    _check(input, gamma, name)
    wide = input.float()
    rstd = torch.rsqrt(wide.square().mean(_normalised(gamma), keepdim=True) + epsilon)
    return (wide * rstd * (1.0 + gamma.float())).to(input.dtype), rstd


def _normalised(gamma: Tensor) -> list[int]:
    return list(range(-gamma.dim(), 0))


def _check(input: Tensor, gamma: Tensor, name: str) -> None:
    require_dtype(name, "input", input, FLOATS)
    require_dtype(name, "gamma", gamma, FLOATS)
    pair_allowed = input.dtype == gamma.dtype or (input.dtype in HALF and gamma.dtype == torch.float32)
    require(
        pair_allowed,
        name,
        f"gamma must have the dtype of input, or be float32 with a half input: not {gamma.dtype} with {input.dtype}",
    )
    require(1 <= input.dim() <= 8, name, f"input must have 1 to 8 dimensions, not {input.dim()}")
    require(
        1 <= gamma.dim() <= input.dim() and input.shape[-gamma.dim() :] == gamma.shape,
        name,
        f"gamma {list(gamma.shape)} must be the trailing dimensions of input {list(input.shape)}",
    )


KERNELS = {
    "npu_rms_norm": Kernel(npu_rms_norm, made_contiguous=("input", "gamma")),
    "npu_rms_norm_backward": Kernel(npu_rms_norm_backward, made_contiguous=("dy", "input", "gamma", "rstd")),
    "npu_add_rms_norm": Kernel(npu_add_rms_norm, made_contiguous=("x1", "x2", "gamma")),
    "npu_gemma_rms_norm": Kernel(npu_gemma_rms_norm),
}
