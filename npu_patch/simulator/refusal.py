"""Rules of the operators' documentation, checked where the real operator would fail or misbehave."""

from typing import TypeVar

import torch
from torch import Tensor

from .current import current
from .errors import Refused

Value = TypeVar("Value")
HALF = (torch.float16, torch.bfloat16)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def require(allowed: bool, operator: str, rule: str) -> None:
    """Raise `Refused` with the operator's name and the broken rule unless `allowed`."""
    if not allowed:
        raise Refused(f"{operator}: {rule}")


def values_count() -> bool:
    """Whether what a tensor holds is a call's. A capture runs nothing, and its inputs may be buffers to be filled."""
    return current.capture is None


def given(value: Value | None, operator: str, rule: str) -> Value:
    """An argument that `rule` does not allow to be left out."""
    if value is None:
        raise Refused(f"{operator}: {rule}")
    return value


def require_dtype(operator: str, name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    require(
        tensor.dtype in dtypes,
        operator,
        f"the dtype of {name} must be one of {', '.join(map(short, dtypes))}, not {short(tensor.dtype)}",
    )


def require_same_dtype(operator: str, **tensors: Tensor | None) -> None:
    """`tensors`: argument names and values; None is left out."""
    dtypes = {name: tensor.dtype for name, tensor in tensors.items() if tensor is not None}
    require(
        len(set(dtypes.values())) <= 1,
        operator,
        "dtypes must be equal, not " + ", ".join(f"{name} {short(dtype)}" for name, dtype in dtypes.items()),
    )


def require_contiguous(operator: str, name: str, tensor: Tensor) -> None:
    require(
        tensor.is_contiguous(),
        operator,
        f"{name} must be contiguous (strides {list(tensor.stride())} for shape {list(tensor.shape)})",
    )


def require_not_empty(operator: str, name: str, tensor: Tensor) -> None:
    require(tensor.numel() > 0, operator, f"{name} must not be empty (shape {list(tensor.shape)})")


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
