"""Every aten operator of the npu device, run on the CPU over the same memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from . import aten_copies, aten_formulas, aten_recurrent, counters, memory, rng
from .memory import CPU
from .shared import Shared

# torch_npu's own kernels stay for what only concerns shapes, storages, allocations and streams. Views stay as well
# (`is_view`).
KEPT = {
    "_has_compatible_shallow_copy_type",
    "_lazy_clone",
    "_pin_memory",
    "_to_copy",  # what it does to float64 and to copies that do not wait; it ends in empty_strided and copy_
    "as_strided_",
    "is_pinned",
    "is_set_to",
    "new_empty_strided",
    "record_stream",
    "resize_",
    "resize_as_",
    "scaled_dot_product_attention",  # torch_npu's own branches, which end in the fused operators
    "_fused_sdp_choice",
    "_scaled_dot_product_attention_math",
    "set_",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
    "set_.source_Tensor",
    "to_padded_tensor",
}

# torch_npu's autograd kernels of these call a CANN operator themselves. None of them has a gradient.
AUTOGRAD_TOO = {
    "affine_grid_generator_backward",
    "conv_tbc_backward",
    "max.out",
    "min.out",
    "nanmean.out",
    "one_hot",
}

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

_libraries: list[torch.library.Library] = []  # registrations end with the library object


def register() -> None:
    """Override every aten kernel that torch_npu registers for the npu device."""
    library = torch.library.Library("aten", "IMPL")
    _libraries.append(library)
    for registered in torch._C._dispatch_get_registrations_for_dispatch_key("PrivateUse1"):
        namespace, _, name = registered.partition("::")
        if namespace != "aten" or name in KEPT:
            continue
        operator = _operator(name)
        if operator is None or operator.is_view or torch.Tag.inplace_view in operator.tags:
            continue
        library.impl(name, _kernel(name, operator), "PrivateUse1", allow_override=True)
    for name in AUTOGRAD_TOO:
        library.impl(name, _kernel(name, _known(name)), "AutogradPrivateUse1", allow_override=True)
    for name, composite in aten_formulas.COMPOSITES.items():
        library.impl(name, composite, "AutogradPrivateUse1", allow_override=True)
    for name, kernel in (aten_copies.KERNELS | aten_recurrent.KERNELS).items():
        library.impl(name, kernel, "PrivateUse1", allow_override=True)
    for name in aten_recurrent.COMPOSED:
        for key in ("PrivateUse1", "AutogradPrivateUse1"):
            library.impl(name, aten_recurrent.composed(_known(name)), key, allow_override=True)


def _known(name: str) -> OpOverload:
    operator = _operator(name)
    if operator is None:
        raise LookupError(f"torch has no aten::{name}")
    return operator


def _kernel(name: str, operator: OpOverload) -> Callable[..., Any]:
    formula = aten_formulas.FORMULAS.get(name)
    return aten_formulas.on_device(name, formula) if formula else kernel_for(operator)


def _operator(name: str) -> OpOverload | None:
    """`name` as in "add.Tensor". None for the names that torch_npu registers without a schema."""
    packet, _, overload = name.partition(".")
    try:
        return getattr(getattr(torch.ops.aten, packet), overload or "default")
    except AttributeError:
        return None


def kernel_for(operator: OpOverload) -> Callable[..., Any]:
    """The npu kernel of an aten operator: the CPU's, on aliases."""
    schema = operator._schema
    name = schema.name
    short = name.partition("::")[2]
    arguments = schema.arguments
    mutable = [(i, a.name) for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    outs = {a.name for a in arguments if a.is_out}
    # For each return, the argument that it is, or None for a new tensor.
    returned: list[str | None] = [_argument_returned(value, arguments) for value in schema.returns]
    position = {a.name: i for i, a in enumerate(arguments)}
    has_device = any(a.name == "device" for a in arguments)
    is_random = torch.Tag.nondeterministic_seeded in operator.tags
    takes_generator = any(a.name == "generator" for a in arguments)
    is_sync = bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(operator.tags))
    boolean_index = short in BOOLEAN_INDEX
    reads_mutable = short not in ONLY_WRITTEN
    on_cpu_too = {position[key] for key in ON_CPU_TOO.get(short, ()) if key in position}
    compute: Callable[..., Any] = operator
    if short in INT32_TOO:
        compute = _in_int64(operator, position[INT32_TOO[short]])

    def kernel(*args: Any, **kwargs: Any) -> Any:
        shared = Shared(name)
        on_cpu = [shared.take(value, i in on_cpu_too) for i, value in enumerate(args)]
        for i, key in mutable:
            if key not in outs:
                changed = args[i] if i < len(args) else kwargs.get(key)
                if changed is not None:
                    shared.note_device(changed)
        named = {}
        fresh = {}
        for key, value in kwargs.items():
            if key in outs:
                named[key] = fresh[key] = _fresh_out(value)
                shared.note_device(value)
            else:
                named[key] = shared.take(value)
        if has_device:
            shared.device = memory.device_index(kwargs.get("device"), shared.device)
            named.pop("pin_memory", None)
        if shared.device is None:
            shared.device = torch.npu.current_device()

        with torch._C._AutoDispatchBelowAutograd():
            if is_random:
                seed, offset = rng.next_seed_and_offset(shared.generator, shared.device)
                if takes_generator:
                    if "generator" in named or len(on_cpu) <= position["generator"]:
                        named["generator"] = rng.cpu_generator(seed, offset)
                    else:
                        on_cpu[position["generator"]] = rng.cpu_generator(seed, offset)
                    result = _run(compute, on_cpu, named, mutable)
                else:
                    with rng.default_cpu_generator(seed, offset):
                        result = _run(compute, on_cpu, named, mutable)
            else:
                result = _run(compute, on_cpu, named, mutable)
            for key, value in fresh.items():
                _write_out(kwargs[key], value)

        if counters._counting:
            changed = [on_cpu[i] if i < len(on_cpu) else named.get(key) for i, key in mutable]
            inputs = [*on_cpu, *(value for key, value in named.items() if key not in outs)]
            if not reads_mutable:
                inputs = inputs[1:]
            new = [
                value
                for value, source in zip(_as_tuple(result, len(returned)), returned, strict=True)
                if source is None
            ]
            counters.launch(name, inputs, [*changed, *new])
            if _has_boolean_index(on_cpu) if boolean_index else is_sync and named.get("output_size") is None:
                for _ in range(HOST_COPIES.get(short, 1)):
                    counters.host_copy(name, 8)

        if not returned:
            return None
        if len(returned) == 1:
            source = returned[0]
            if source is None:
                return shared.give(result)
            return kwargs[source] if source in kwargs else args[position[source]]
        return tuple(
            shared.give(value) if source is None else kwargs[source] if source in kwargs else args[position[source]]
            for value, source in zip(_as_tuple(result, len(returned)), returned, strict=True)
        )

    return kernel


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
