"""npu_group_norm_silu: group normalisation, then SiLU.

Source: torch_npu's operator documentation and op-plugin's tests. It has no derivative: torch_npu warns in backward and
the gradient is undefined.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..refusal import FLOATS, require, require_dtype, require_not_empty, require_same_dtype
from .kernel import Kernel


def npu_group_norm_silu(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, group: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and rstd [N, group], all in input's dtype; in float32 with one rounding.

    input: 2 to 8 dimensions, float16, bfloat16 or float32, not empty, its second dimension C a multiple of group.
    weight, bias: [C], one dtype, input's or float32.
    """
    name = "npu_group_norm_silu"
    require_dtype(name, "input", input, FLOATS)
    require(2 <= input.dim() <= 8, name, f"input must have 2 to 8 dimensions, not {input.dim()}")
    require_not_empty(name, "input", input)
    channels = input.shape[1]
    require(group > 0 and channels % group == 0, name, f"group must divide {channels} channels, not {group}")
    require(eps > 0, name, f"eps must be above 0, not {eps}")
    require_same_dtype(name, weight=weight, bias=bias)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            require_dtype(name, argument, tensor, (input.dtype, torch.float32))
            require(
                list(tensor.shape) == [channels], name, f"{argument} must be [{channels}], not {list(tensor.shape)}"
            )
    grouped = input.float().reshape(input.shape[0], group, -1)
    mean = grouped.mean(-1)
    rstd = torch.rsqrt(grouped.var(-1, correction=0) + eps)
    normalised = ((grouped - mean[..., None]) * rstd[..., None]).view(input.shape)
    along_channels = (1, channels, *(1,) * (input.dim() - 2))
    if weight is not None:
        normalised = normalised * weight.float().view(along_channels)
    if bias is not None:
        normalised = normalised + bias.float().view(along_channels)
    return silu(normalised).to(input.dtype), mean.to(input.dtype), rstd.to(input.dtype)


KERNELS = {"npu_group_norm_silu": Kernel(npu_group_norm_silu, made_contiguous=("input", "weight", "bias"))}
