"""An implementation of an op: which devices it serves, what the machine must have for it, and how it is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from npu_patch.devices import is_simulated
from npu_patch.kernels.readiness import why_not
from npu_patch.serving.operators import Operator

TRITON = "triton"
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)
Call = ParamSpec("Call")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Implementation(Generic[Call, Result]):
    """One way to compute an op on tensors of the named device types.

    `missing()` says what the machine lacks for it, or None. `unsupported(...)` says why it cannot serve one call, or
    None; it looks at devices, dtypes and shapes only, and never at a value. `optional`: taken in the place of another
    one, or of the original, as a switch of its patch says (`Patch.optional`). `partly`: operators without which it
    serves only some calls, by the kind of the others, which the report names.
    """

    name: str
    device_types: tuple[str, ...]
    run: Callable[Call, Result]
    unsupported: Callable[Call, str | None]
    missing: Callable[[], str | None] = lambda: None
    optional: bool = False
    partly: Mapping[str, Operator] = field(default_factory=dict)


AnyImplementation = Implementation[..., Any]


@dataclass(frozen=True)
class Choice(Generic[Call, Result]):
    """The implementation that serves a device, and why each other one does not.

    `candidates` are optional implementations that go before it: always where `forced`, else for the calls for which
    they were measured to be faster.
    """

    chosen: Implementation[Call, Result] | None
    declined: dict[str, str]
    candidates: tuple[Implementation[Call, Result], ...] = ()
    forced: bool = False

    def why_none(self) -> str:
        return "no implementation: " + "; ".join(f"{name}: {reason}" for name, reason in self.declined.items())


AnyChoice = Choice[..., Any]


def choose(
    implementations: Sequence[Implementation[Call, Result]],
    device_type: str,
    optional: bool | str = False,
    source: str = "default",
) -> Choice[Call, Result]:
    """The first of `implementations` that serves `device_type` on this machine.

    `optional` is the switch for optional ones: False leaves them out, True takes them, "auto" makes them candidates;
    `source` says where that comes from.
    """
    chosen: Implementation[Call, Result] | None = None
    candidates: list[Implementation[Call, Result]] = []
    declined: dict[str, str] = {}
    for implementation in implementations:
        if device_type not in implementation.device_types:
            declined[implementation.name] = f"serves {', '.join(implementation.device_types)} only"
        elif implementation.optional and (reason := _why_left_out(optional, source, device_type)) is not None:
            declined[implementation.name] = reason
        elif (lacking := implementation.missing()) is not None:
            declined[implementation.name] = lacking
        elif implementation.optional:
            candidates.append(implementation)
        elif chosen is not None:
            declined[implementation.name] = f"{chosen.name} comes first"
        else:
            chosen = implementation
            lacks = {kind: operator.missing() for kind, operator in implementation.partly.items()}
            declined |= {f"{implementation.name}, {kind}": reason for kind, reason in lacks.items() if reason}
    return Choice(chosen, declined, tuple(candidates), forced=optional is True)


def _why_left_out(optional: bool | str, source: str, device_type: str) -> str | None:
    if optional is False:
        return f"switched off by {source}"
    if optional == "auto" and is_simulated(device_type):
        return "times on the simulated device mean nothing"
    return None


def needs_operators(*operators: Operator) -> Callable[[], str | None]:
    """A `missing` for implementations that call operators of torch_npu."""

    def missing() -> str | None:
        try:
            importlib.import_module("torch_npu")
        except Exception as error:  # a broken CANN raises more than ImportError
            return f"torch_npu cannot be imported: {error}"
        return "; ".join(reason for operator in operators if (reason := operator.missing())) or None

    return missing


def needs_triton() -> str | None:
    """A `missing` for implementations that are Triton kernels."""
    return why_not()


def is_plain(tensor: Tensor) -> bool:
    """Whether this is a tensor of one device, not a subclass such as DTensor, which the operators do not take."""
    return type(tensor) is Tensor or type(tensor) is torch.nn.Parameter


def layout(tensor: Tensor) -> str:
    """What a reason says of a tensor: not its batch and length, or there were a reason for each of them to count."""
    if tensor.numel() == 0:
        return "0 elements"
    return f"{tensor.dim()} dimensions, {tensor.shape[-1] if tensor.dim() else 1} wide"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
