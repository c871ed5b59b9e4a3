"""A linear layer whose weight is int8: what a W8A8 checkpoint is loaded into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Linear, Parameter

from npu_patch.ops.w8a8.linear import TORCH_INT8, computed_in, definition, int8_linear


def computes_in(layer: W8A8Linear, of_model: torch.dtype) -> torch.dtype:
    """Without autocast: in the dtype of its scales; float32 ones stand in models of any dtype."""
    of_scale = layer.weight_scale.dtype
    return of_model if of_scale is torch.float32 else of_scale


class W8A8Linear(Linear):
    """`weight`: int8 `[N, K]`, frozen; `weight_scale`: `[N, 1]`, frozen, in the dtype that it computes in, or float32;
    `bias`: as of any linear layer. It computes on every device in plain torch; where npu_patch is applied, by the
    device's operators."""

    weight_scale: Parameter

    def __init__(
        self, in_features: int, out_features: int, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__(in_features, out_features, bias, "meta", dtype)
        kind = self.weight.dtype
        weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = Parameter(weight, requires_grad=False)
        self.weight_scale = Parameter(torch.empty(out_features, 1, dtype=kind, device=device), requires_grad=False)
        if bias:
            self.bias = Parameter(torch.empty(out_features, dtype=kind, device=device))

    def forward(self, input: Tensor) -> Tensor:
        """input `[..., K]` -> `[..., N]` in its dtype, or in autocast's. Within transforms of torch.func, which take no
        such autograd function, it is computed in float32."""
        dtype, weight, scale, bias = computed_in(input), self.weight, self.weight_scale, self.bias
        if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
            return definition(input.float(), weight, scale, None if bias is None else bias.float()).to(dtype)
        return int8_linear(TORCH_INT8, input, weight, scale, bias, dtype)
