"""Gamma: what an RMSNorm multiplies a normalized row by, made from its weight. Needs no triton."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gamma:
    """A way to use a weight `[D]`.

    `value(weight)` is what operators take, in the dtype that they are given. Of a float64 weight it is the exact
    definition. `kernel` is the number under which `load_gamma` makes the same in a Triton kernel, or None where it does
    not. `derivative(weight)` is d gamma / d weight in float32, or None where it is 1: kernels sum the gradient of
    gamma.
    """

    name: str
    value: Callable[[Any], Tensor | None]  # of None only where gamma is none
    kernel: int | None = None
    derivative: Callable[[Tensor], Tensor] | None = None

    @property
    def why_no_kernel(self) -> str | None:
        return f"gamma is {self.name!r}, for which there is no kernel" if self.kernel is None else None

    def summed_in(self, *weights: Tensor) -> torch.dtype:
        """The dtype that sums of gamma's gradient are rounded to: the weights', unless more is to be done with them."""
        dtype = weights[0].dtype
        mixed = any(weight.dtype != dtype for weight in weights[1:])
        return dtype if self.derivative is None and not mixed else torch.float32

    def weight_gradient(self, d_gamma: Tensor, weight: Tensor) -> Tensor:
        """The weight's gradient from gamma's, `d_gamma` in the dtype of `summed_in`."""
        if self.derivative is not None:
            d_gamma = d_gamma * self.derivative(weight)
        return d_gamma if d_gamma.dtype == weight.dtype else d_gamma.to(weight.dtype)


def widened(weight: Tensor) -> Tensor:
    return weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight


NONE = Gamma("none", lambda weight: None, kernel=0)
# Keeps its dtype: the operators take it as it is.
WEIGHT = Gamma("weight", lambda weight: weight, kernel=1)
# In float32: in bfloat16 the sum would lose up to 8 bits of a weight near zero.
ONE_PLUS_WEIGHT = Gamma("1 + weight", lambda weight: 1.0 + widened(weight), kernel=2)
ROUNDED_ONE_PLUS_WEIGHT = Gamma("rounded 1 + weight", lambda weight: widened(1.0 + weight), kernel=3)
GAMMAS = (NONE, WEIGHT, ONE_PLUS_WEIGHT, ROUNDED_ONE_PLUS_WEIGHT)
# Of the gates that kernels have, by the names of `ops.rms_norm`: their numbers there.
ACTIVATIONS = {"sigmoid": 1, "silu": 2}
