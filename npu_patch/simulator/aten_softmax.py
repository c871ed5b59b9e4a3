"""Softmax of a half input with a float32 result (`half_to_float`): the NPU has it, the CPU does not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _widened(operator: Any) -> Callable[[Tensor, int, bool], Tensor]:
    def formula(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
        if half_to_float and self.dtype not in (torch.float16, torch.bfloat16):
            raise RuntimeError(f"conversion is supported for Half and BFloat16 only, not {self.dtype}")
        return operator(self.float() if half_to_float else self, dim, False)

    return formula


def _narrowed(operator: Any) -> Callable[[Tensor, Tensor, int, torch.dtype], Tensor]:
    def formula(grad_output: Tensor, output: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
        return operator(grad_output, output, dim, output.dtype).to(input_dtype)

    return formula


FORMULAS: dict[str, Callable[..., Any]] = {
    "_softmax": _widened(torch.ops.aten._softmax.default),
    "_log_softmax": _widened(torch.ops.aten._log_softmax.default),
    "_softmax_backward_data": _narrowed(torch.ops.aten._softmax_backward_data.default),
    "_log_softmax_backward_data": _narrowed(torch.ops.aten._log_softmax_backward_data.default),
}
