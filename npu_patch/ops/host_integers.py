"""Integers of a device, copied to the host: not a computation, but what a model does with grids and token ids."""

from __future__ import annotations

from torch import Tensor

from npu_patch.serving.implementation import Implementation
from npu_patch.serving.op import Op

HOST_INTEGERS: Op[[Tensor], Tensor] = Op(
    "host integers",
    (Implementation("one copy to the host", ("npu", "cuda"), Tensor.cpu, lambda tensor: None),),
    lambda tensor: (tensor.dtype,),
    lambda tensor: tensor.cpu(),
)
