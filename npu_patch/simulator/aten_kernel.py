"""The npu kernel of one aten operator: the CPU's, on aliases."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import counters, memory, rng
from .memory import CPU
from .shared import Shared

# What an operator changes in place without reading it.
ONLY_WRITTEN = {"zero_", "fill_", "normal_", "uniform_", "bernoulli_", "exponential_", "random_"}

# Arguments that may be on the CPU next to npu tensors, beside numbers (CPU tensors without dimensions) anywhere.
ON_CPU_TOO = {
    "index": {"indices"},
    "index_put": {"indices"},
    "index_put_": {"indices"},
    "_index_put_impl_": {"indices"},
    "_ctc_loss": {"input_lengths", "target_lengths"},
    "_pack_padded_sequence": {"lengths"},
}

# Arguments that the CPU takes in int64 only and the NPU in int32 too.
INT32_TOO = {
    **dict.fromkeys(("nll_loss_forward", "nll_loss_backward", "nll_loss2d_forward", "nll_loss2d_backward"), "target"),
    **dict.fromkeys(("gather", "scatter", "scatter_", "scatter_add", "scatter_add_"), "index"),
}

# These wait for the device only if an index is boolean: torch turns it into integers first.
BOOLEAN_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}

# Operators that wait for the device more than once: bincount reads the smallest and the largest value.
HOST_COPIES = {"bincount": 2}


class Kernel:
    """`run` is what stands for `operator`. What its schema says is read once."""

    def __init__(self, operator: OpOverload) -> None:
        schema = operator._schema
        self.name, arguments = schema.name, schema.arguments
        self.short = self.name.partition("::")[2]
        self.mutable = [
            (i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write
        ]
        self.outs = {a.name for a in arguments if a.is_out}
        # For each return, the argument that it is, or None for a new tensor.
        self.returned = [_argument_returned(value, arguments) for value in schema.returns]
        self.position = {a.name: i for i, a in enumerate(arguments)}
        self.has_device = "device" in self.position
        self.takes_generator = "generator" in self.position
        self.is_random = torch.Tag.nondeterministic_seeded in operator.tags
        self.is_sync = bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(operator.tags))
        self.on_cpu_too = {self.position[key] for key in ON_CPU_TOO.get(self.short, ()) if key in self.position}
        self.compute: Callable[..., Any] = operator
        if self.short in INT32_TOO:
            self.compute = _in_int64(operator, self.position[INT32_TOO[self.short]])

    def run(self, *args: Any, **kwargs: Any) -> Any:
        shared = Shared(self.name)
        on_cpu = [shared.take(value, i in self.on_cpu_too) for i, value in enumerate(args)]
        for i, key in self.mutable:
            if key not in self.outs:
                changed = args[i] if i < len(args) else kwargs.get(key)
                if changed is not None:
                    shared.note_device(changed)
        named = {}
        fresh = {}
        for key, value in kwargs.items():
            if key in self.outs:
                named[key] = fresh[key] = _fresh_out(value)
                shared.note_device(value)
            else:
                named[key] = shared.take(value)
        if self.has_device:
            shared.device = memory.device_index(kwargs.get("device"), shared.device)
            named.pop("pin_memory", None)
        if shared.device is None:
            shared.device = torch.get_device_module("npu").current_device()
        with torch._C._AutoDispatchBelowAutograd():
            if self.is_random:
                result = self._drawn(rng.next_seed_and_offset(shared.generator, shared.device), on_cpu, named)
            else:
                result = _run(self.compute, on_cpu, named, self.mutable)
            for key, value in fresh.items():
                _write_out(kwargs[key], value)
        if counters.is_counting():
            self._count(on_cpu, named, result)
        return self._given(shared, result, args, kwargs)

    def _drawn(self, state: tuple[int, int], on_cpu: list[Any], named: dict[str, Any]) -> Any:
        """With the numbers that come next of the given generator, or of the device's."""
        if not self.takes_generator:
            with rng.default_cpu_generator(*state):
                return _run(self.compute, on_cpu, named, self.mutable)
        at = self.position["generator"]
        if "generator" in named or len(on_cpu) <= at:
            named["generator"] = rng.cpu_generator(*state)
        else:
            on_cpu[at] = rng.cpu_generator(*state)
        return _run(self.compute, on_cpu, named, self.mutable)

    def _count(self, on_cpu: list[Any], named: dict[str, Any], result: Any) -> None:
        changed = [on_cpu[i] if i < len(on_cpu) else named.get(key) for i, key in self.mutable]
        inputs = [*on_cpu, *(value for key, value in named.items() if key not in self.outs)]
        if self.short in ONLY_WRITTEN:
            inputs = inputs[1:]
        results = zip(_as_tuple(result, len(self.returned)), self.returned, strict=True)
        counters.launch(self.name, inputs, [*changed, *(value for value, source in results if source is None)])
        if self.short in BOOLEAN_INDEX:
            waits = _has_boolean_index(on_cpu)
        else:
            waits = self.is_sync and named.get("output_size") is None
        for _ in range(HOST_COPIES.get(self.short, 1) if waits else 0):
            counters.host_copy(self.name, 8)

    def _given(self, shared: Shared, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The results as npu tensors, or the arguments that they are."""

        def given(value: Any, source: str | None) -> Any:
            if source is None:
                return shared.give(value)
            return kwargs[source] if source in kwargs else args[self.position[source]]

        returned = self.returned
        results = tuple(map(given, _as_tuple(result, len(returned)), returned))
        return results if len(returned) > 1 else results[0] if returned else None


def _argument_returned(value: Any, arguments: list[Any]) -> str | None:
    if value.alias_info is None or not value.alias_info.is_write:
        return None
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.before_set == value.alias_info.before_set:
            return argument.name
    return None


def _as_tuple(result: Any, length: int) -> tuple[Any, ...]:
    if length == 1:
        return (result,)
    return () if length == 0 else tuple(result)


def _in_int64(operator: OpOverload, at: int) -> Callable[..., Any]:
    """The operator, taking int32 as its argument number `at`."""

    def compute(*args: Any, **kwargs: Any) -> Any:
        if args[at].dtype == torch.int32:
            args = (*args[:at], args[at].long(), *args[at + 1 :])
        return operator(*args, **kwargs)

    return compute


def _run(operator: Callable[..., Any], args: list[Any], kwargs: dict[str, Any], mutable: list[tuple[int, str]]) -> Any:
    try:
        return operator(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        if "not implemented for" not in str(error):
            raise
        return _run_wider(operator, args, kwargs, mutable, error)


def _run_wider(
    operator: Callable[..., Any],
    args: list[Any],
    kwargs: dict[str, Any],
    mutable: list[tuple[int, str]],
    error: Exception,
) -> Any:
    """Compute in a wider dtype what the CPU lacks in a narrow one and the NPU has."""
    narrow = {v.dtype for v in [*args, *kwargs.values()] if isinstance(v, Tensor)} & _WIDER.keys()
    if len(narrow) != 1 or kwargs.get("dtype") is not None:
        raise error
    dtype = narrow.pop()
    wider = _WIDER[dtype]

    def widened(value: Any) -> Any:
        return value.to(wider) if isinstance(value, Tensor) and value.dtype == dtype else value

    def narrowed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [narrowed(item) for item in value]
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype == wider else value

    wide_args, wide_kwargs = [widened(v) for v in args], {key: widened(v) for key, v in kwargs.items()}
    try:
        result = operator(*wide_args, **wide_kwargs)
    except (RuntimeError, NotImplementedError):
        raise error from None
    for i, key in mutable:
        (args[i] if i < len(args) else kwargs[key]).copy_(wide_args[i] if i < len(args) else wide_kwargs[key])
    return narrowed(result)


_WIDER = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int8: torch.float64,
    torch.int16: torch.float64,
    torch.int32: torch.float64,
    torch.int64: torch.float64,
    torch.uint8: torch.float64,
    torch.bool: torch.uint8,
}


def _fresh_out(value: Tensor | list[Tensor]) -> Any:
    """A CPU tensor for an `out=` argument: an alias could not be resized."""
    if isinstance(value, list | tuple):
        return [_fresh_out(item) for item in value]
    return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=CPU)


def _write_out(out: Tensor | list[Tensor], value: Any) -> None:
    if isinstance(out, list | tuple):
        for one, result in zip(out, value, strict=True):
            _write_out(one, result)
        return
    if out.shape != value.shape:
        out.resize_(value.shape)
    memory.alias(out).copy_(value)


def _has_boolean_index(args: list[Any]) -> bool:
    return any(
        isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
        for value in args
        if isinstance(value, list | tuple)
        for index in value
    )
