"""GELU's approximations that models write out in parts: `x * sigmoid(1.702 * x)` and the one by tanh
(https://arxiv.org/abs/1606.08415, section 2).

Each is one operator, forward and backward, in place of three to eight, and keeps x alone. A call is x of any shape and
the approximation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.serving.case import Case
from npu_patch.serving.implementation import FLOAT_DTYPES, Implementation, dtype_name, is_plain, layout, needs_operators
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

NPU_FAST_GELU = Operator("npu_fast_gelu", gradient=True)


@dataclass(frozen=True)
class Approximation:
    name: str
    reference: Callable[[Tensor], Tensor]


SIGMOID = Approximation("x * sigmoid(1.702 x)", lambda x: x * torch.sigmoid(1.702 * x))
TANH = Approximation(
    "tanh", lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
)
APPROXIMATIONS = (SIGMOID, TANH)


def _npu_fast_gelu(x: Tensor, approximation: Approximation) -> Tensor:
    y: Tensor = torch.ops.npu.npu_fast_gelu(x)
    return y


def _gelu_by_tanh(x: Tensor, approximation: Approximation) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _unsupported_by_sigmoid(x: Tensor, approximation: Approximation) -> str | None:
    return _unsupported(x) if approximation is SIGMOID else f"it is {SIGMOID.name}"


def _unsupported_by_tanh(x: Tensor, approximation: Approximation) -> str | None:
    return _unsupported(x) if approximation is TANH else f"it is {TANH.name}"


def _unsupported(x: Tensor) -> str | None:
    if not is_plain(x):
        return "tensor subclass"
    if x.dtype not in FLOAT_DTYPES:
        return f"an input of {x.dtype}"
    return layout(x) if x.numel() == 0 or x.dim() > 8 else None


def _key(x: Tensor, approximation: Approximation) -> Hashable:
    return approximation.name, x.dtype


GELU_BY_SIGMOID: Op[[Tensor, Approximation], Tensor] = Op(
    "gelu by sigmoid",
    (
        Implementation(
            "torch_npu.npu_fast_gelu",
            ("npu",),
            _npu_fast_gelu,
            _unsupported_by_sigmoid,
            needs_operators(NPU_FAST_GELU),
        ),
    ),
    _key,
    lambda x, approximation: approximation.reference(x),
    (SIGMOID,),
)
GELU_BY_TANH: Op[[Tensor, Approximation], Tensor] = Op(
    "gelu by tanh",
    (Implementation("torch, gelu", ("npu", "cuda"), _gelu_by_tanh, _unsupported_by_tanh),),
    _key,
    lambda x, approximation: approximation.reference(x),
    (TANH,),
)
BY_APPROXIMATION = {SIGMOID: GELU_BY_SIGMOID, TANH: GELU_BY_TANH}


def case(approximation: Approximation, dtype: torch.dtype) -> Case:
    def call(function: Callable[..., Any], x: Tensor) -> Any:
        return function(x, approximation)

    return Case(BY_APPROXIMATION[approximation], dtype_name(dtype), lambda tokens: [((tokens, 64), dtype)], call)
