"""What turns a formula on CPU tensors into an npu kernel of a fused operator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import counters, graph_nodes, graphs, memory, rng, wrong
from ..refusal import require


@dataclass(frozen=True)
class Kernel:
    """One fused operator.

    `formula` takes the operator's arguments, in the schema's order and by the schema's keyword names, defaults filled
    in, with every npu tensor as a CPU tensor over the same memory; it returns what the schema says. A result that is
    one of its arguments stays that npu tensor (in-place operators).
    """

    formula: Callable[..., Any]
    made_contiguous: tuple[str, ...] = ()
    """Arguments that the operator's wrapper copies first if they are not contiguous; such a copy counts as a launch."""
    needs_gradient: tuple[str, ...] = ()
    """Arguments x for which the formula takes `x_requires_grad`, as the C++ wrapper looks at it."""
    on_host: tuple[str, ...] = ()
    """Tensor arguments that the operator documents as CPU tensors; every other one must be on the npu."""
    only_written: tuple[str, ...] = ()
    """Arguments that the formula writes to and does not read; a schema need not say so."""
    launches: bool = True
    """False for what only allocates: it counts nothing."""
    draws: bool = False
    """The formula takes `draw()`, which gives the (seed, offset) of the device's generator and moves it on."""


@dataclass(frozen=True)
class OnHost:
    """A result that the operator returns as a CPU tensor."""

    tensor: Tensor


def is_declared(name: str) -> bool:
    """Whether this torch_npu has the operator (and overload) `npu::name`."""
    packet, _, overload = name.partition(".")
    return hasattr(torch.ops.npu, packet) and (overload or "default") in getattr(torch.ops.npu, packet).overloads()


def npu_kernel(name: str, kernel: Kernel) -> Callable[..., Any]:
    """The function to register for `npu::name` at the dispatch key PrivateUse1."""
    packet, _, overload = name.partition(".")
    schema = getattr(getattr(torch.ops.npu, packet), overload or "default")._schema
    arguments = schema.arguments
    positional = [a for a in arguments if not a.kwarg_only]
    keywords = [a for a in arguments if a.kwarg_only]
    position = {a.name: i for i, a in enumerate(positional)}
    names = [a.name for a in positional]
    full_name = f"npu::{packet}"
    copy_name = f"contiguous(inside {packet})"

    def compute(arguments: Mapping[str, Any]) -> Any:
        others = {name: value for name, value in arguments.items() if name not in position}
        return kernel.formula(*(arguments[name] for name in names), **others)

    def launch(*args: Any, **kwargs: Any) -> Any:
        values = [args[i] if i < len(args) else kwargs.get(a.name, a.default_value) for i, a in enumerate(positional)]
        named = {a.name: kwargs.get(a.name, a.default_value) for a in keywords}
        aliases = _Aliases(packet)
        on_cpu = [aliases.take(value, a.name in kernel.on_host) for value, a in zip(values, positional, strict=True)]
        named_on_cpu = {key: aliases.take(value, key in kernel.on_host) for key, value in named.items()}
        extra: dict[str, Any] = {}
        for argument in kernel.needs_gradient:
            value = values[position[argument]]
            extra[f"{argument}_requires_grad"] = value is not None and value.requires_grad
        if kernel.draws:
            extra["draw"] = lambda: rng.next_seed_and_offset(None, memory.or_current(aliases.device))
        with torch._C._AutoDispatchBelowAutograd():
            if wrong.is_any(packet):
                result = wrong.spoiled(
                    packet, compute, {**dict(zip(names, on_cpu, strict=True)), **named_on_cpu, **extra}
                )
            else:
                result = kernel.formula(*on_cpu, **named_on_cpu, **extra)
        if isinstance(result, tuple):
            result = result[: len(schema.returns)]  # an older torch_npu declares fewer
        if kernel.launches and counters.is_counting():
            _count(full_name, copy_name, kernel, position, on_cpu, named_on_cpu, result)
        return aliases.give(result)

    return graphs.leaf(full_name, launch, graph_nodes.written_by_schema(schema, kernel.only_written))


def _count(
    name: str,
    copy_name: str,
    kernel: Kernel,
    position: dict[str, int],
    on_cpu: list[Any],
    named: dict[str, Any],
    result: Any,
) -> None:
    for argument in kernel.made_contiguous:
        value = on_cpu[position[argument]] if argument in position else named[argument]
        if isinstance(value, Tensor) and not value.is_contiguous():
            counters.launch(copy_name, [value], [torch.empty(value.shape, dtype=value.dtype, device="meta")])
    written = [v for v in (result if isinstance(result, list | tuple) else (result,)) if not isinstance(v, OnHost)]
    read = [*on_cpu, *(value for argument, value in named.items() if argument not in kernel.only_written)]
    counters.launch(name, read, written)


class _Aliases:
    """One call's npu tensors, their aliases, and the device they are on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.device: int | None = None
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def take(self, value: Any, on_host: bool) -> Any:
        if isinstance(value, Tensor):
            if on_host:
                require(value.device.type == "cpu", self.name, f"lengths must be a CPU tensor, not on {value.device}")
                return value
            require(
                value.device.type == "npu",
                self.name,
                "Expected all tensors to be on the same device, but found at least two devices, npu and "
                f"{value.device}! (a tensor of shape {list(value.shape)})",
            )
            if self.device is None:
                self.device = value.device.index
            require(
                self.device == value.device.index,
                self.name,
                "Expected all tensors to be on the same device, but found at least two devices, "
                f"npu:{self.device} and {value.device}!",
            )
            over = memory.alias(value)
            self.pairs.append((over, value))
            return over
        if isinstance(value, list | tuple):
            return [self.take(item, on_host) for item in value]
        return value

    def give(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            for over, tensor in self.pairs:
                if value is over:
                    return tensor
            # torch_npu allocates results by their sizes: a formula's strides are those of whatever it computed with.
            made = memory.to_device(value.contiguous(), memory.or_current(self.device))
            if counters.is_counting():
                counters.became(value, made)
            return made
        if isinstance(value, OnHost):
            return value.tensor
        if isinstance(value, tuple):
            return tuple(self.give(item) for item in value)
        if isinstance(value, list):
            return [self.give(item) for item in value]
        return value
