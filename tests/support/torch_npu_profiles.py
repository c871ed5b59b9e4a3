"""Releases of torch_npu as data, by what their operators lack, and a way to make the installed one present another's.

    with presenting(RELEASES["2.9.0"]) as calls:   # torch.ops.npu has what 2.9.0 has, and refuses what it refuses
        train(model)

The operators themselves stay those of the installed torch_npu.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch

NEWEST = "2.13.0"
SCHEMAS = Path(__file__).with_name("torch_npu_schemas.txt")  # of the newest
AUTOGRAD = "AutogradPrivateUse1"


@dataclass(frozen=True)
class Profile:
    """How a torch_npu differs from the newest. `absent`: operators it does not have. By operator: arguments `without`
    which it is, and arguments that it declares `otherwise`, as a schema writes them. `without_gradient`: operators
    that leave the gradients out."""

    absent: frozenset[str] = frozenset()
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    otherwise: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    without_gradient: frozenset[str] = frozenset()

    def schema(self, name: str) -> torch.FunctionSchema | None:
        """As the dispatcher of this torch_npu would give it; None for an operator that it does not have."""
        if name in self.absent:
            return None
        before, arguments, after = _newest()[name].schema
        without, otherwise = self.without.get(name, ()), self.otherwise.get(name, {})
        declared = {argument.split(" ")[-1].split("=")[0]: argument for argument in arguments}
        kept = [otherwise.get(each, text) for each, text in declared.items() if each not in without]
        return torch._C.parse_schema(f"npu::{before}({', '.join(kept)}) -> {after}")

    def has_gradient(self, name: str) -> bool:
        return _newest()[name].has_gradient and name not in self.without_gradient

    def lacking(self, operator: str, *, argument: str | None = None, gradient: bool = False) -> Profile:
        """The same without an operator; or without one of its arguments, or without its gradient."""
        if gradient:
            return replace(self, without_gradient=self.without_gradient | {operator})
        if argument is None:
            return replace(self, absent=self.absent | {operator})
        return replace(self, without={**self.without, operator: (*self.without.get(operator, ()), argument)})


_ATTENTION_2_13 = ("dropout_mask", "seed", "offset")
_DTYPES_2_13 = ("x_dtype", "weight_dtype", "scale_dtype", "per_token_scale_dtype")
# 2.9.0 does not have the last two yet, so 2.7.1 neither. They are declined wherever they are.
_OLDER = {
    "absent": frozenset({"npu_fusion_attention_v3", "npu_chunk_gated_delta_rule", "npu_fused_causal_conv1d"}),
    "otherwise": {"npu_grouped_matmul": {"output_dtype": "ScalarType? output_dtype=None"}},
}
RELEASES: dict[str, Profile] = {
    # op-plugin, branch 7.2.0, op_plugin_functions.yaml and derivatives.yaml; the wheel has the same.
    "2.7.1": Profile(
        **_OLDER,
        without={
            "npu_fusion_attention": ("sink", *_ATTENTION_2_13),
            "npu_fusion_attention_v2": ("softmax_layout", "sink", *_ATTENTION_2_13),
            "npu_rotary_mul": ("rotate",),
            "npu_grouped_matmul": _DTYPES_2_13,
        },
    ),
    # The wheel.
    "2.9.0": Profile(
        **_OLDER,
        without={
            "npu_fusion_attention": _ATTENTION_2_13,
            "npu_fusion_attention_v2": _ATTENTION_2_13,
            "npu_rotary_mul": ("rotate",),
            "npu_grouped_matmul": _DTYPES_2_13,
        },
    ),
    # The wheel.
    NEWEST: Profile(),
}

# Wheels whose operators are those of another.
ALIKE = {"2.10.0.post7": NEWEST, "2.14.0": NEWEST}


@dataclass(frozen=True)
class _Recorded:
    schema: tuple[str, tuple[str, ...], str]  # the name, the arguments, the returns
    has_gradient: bool


@cache
def _newest() -> dict[str, _Recorded]:
    recorded = {}
    for line in SCHEMAS.read_text().splitlines():
        if not line.startswith("#"):
            mark, _, text = line.partition(" ")
            call, _, returns = text.partition(") -> ")
            name, _, arguments = call.partition("(")
            recorded[name] = _Recorded((name, tuple(arguments.split(", ")), returns), mark == "*")
    return recorded


def operators() -> tuple[str, ...]:
    """The names of those that a profile speaks of."""
    return tuple(_newest())


def genuine_schema(name: str) -> torch.FunctionSchema | None:
    found = getattr(torch.ops.npu, name, None)
    return None if found is None else found.default._schema


def genuine_gradient(name: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", AUTOGRAD)


def why_not_presentable(profile: Profile) -> str | None:
    """What the installed torch_npu lacks of it, or None."""
    for name in operators():
        wanted, found = profile.schema(name), genuine_schema(name)
        if wanted is not None and found is None:
            return f"this torch_npu has no {name}"
        lacking = {each.name for each in wanted.arguments} - {each.name for each in found.arguments} if wanted else ()
        if lacking:
            return f"this torch_npu's {name} has no {', '.join(sorted(lacking))}"
    return None


def installed() -> Profile:
    """The newest release that the installed torch_npu can present."""
    return next(profile for profile in reversed(RELEASES.values()) if why_not_presentable(profile) is None)


@dataclass(frozen=True)
class Call:
    """`positional` and `keywords`: the names of the arguments that were given."""

    operator: str
    positional: tuple[str, ...]
    keywords: tuple[str, ...]


@contextmanager
def presenting(profile: Profile) -> Iterator[list[Call]]:
    """The calls that the block makes. Operators without a gradient give their results and, as torch_npu's autograd
    fallback, no gradient and no error."""
    calls: list[Call] = []
    genuine_kernels = torch._C._dispatch_has_kernel_for_dispatch_key

    def has_kernel(name: str, key: str) -> bool:
        operator = name.removeprefix("npu::")
        if key == AUTOGRAD and operator in _newest():
            return profile.has_gradient(operator)
        return genuine_kernels(name, key)

    with (
        mock.patch.object(torch.ops, "npu", _Namespace(torch.ops.npu, profile, calls.append)),
        mock.patch.object(torch._C, "_dispatch_has_kernel_for_dispatch_key", has_kernel),
    ):
        yield calls


class _Namespace:
    """`torch.ops.npu`."""

    def __init__(self, genuine: Any, profile: Profile, record: Callable[[Call], None]) -> None:
        self._genuine, self._absent = genuine, profile.absent
        for name in operators():
            if (schema := profile.schema(name)) is not None:
                silent = not profile.has_gradient(name) and genuine_gradient(name)
                setattr(self, name, _Operator(getattr(genuine, name), schema, silent, record))

    def __getattr__(self, name: str) -> Any:
        if name in self._absent:
            raise AttributeError(f"'_OpNamespace' 'npu' object has no attribute '{name}'")
        return getattr(self._genuine, name)


class _Operator:
    """`torch.ops.npu.NAME` and its default overload in one."""

    def __init__(self, genuine: Any, schema: torch.FunctionSchema, silent: bool, record: Callable[[Call], None]):
        self._genuine, self._schema, self._silent, self._record = genuine, schema, silent, record
        self._positional = [argument.name for argument in schema.arguments if not argument.kwarg_only]
        self._names = {argument.name for argument in schema.arguments}
        self.default = self

    def overloads(self) -> list[str]:
        return ["default"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(self._positional):
            raise RuntimeError(f"{self._schema.name}() takes {len(self._positional)} positional arguments: {len(args)}")
        for name in kwargs:
            if name not in self._names:
                raise RuntimeError(f"Unknown keyword argument '{name}' for operator '{self._schema.name}'")
        given = dict(zip(self._positional, args, strict=False)) | kwargs
        self._record(Call(self._schema.name.removeprefix("npu::"), tuple(self._positional[: len(args)]), tuple(kwargs)))
        defaults = {each.name: each.default_value for each in self._schema.arguments if each.has_default_value()}
        if not self._silent:
            return self._genuine(**{**defaults, **given})
        return _WithoutGradient.apply(self._genuine, {**defaults, **given}, *_tensors(given))


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: Any, arguments: dict[str, Any], *_: torch.Tensor) -> Any:
        ctx.inputs = len(_)
        ctx.set_materialize_grads(False)
        return operator(**arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
        return (None,) * (2 + ctx.inputs)


def _tensors(arguments: dict[str, Any]) -> list[torch.Tensor]:
    return [each for each in arguments.values() if isinstance(each, torch.Tensor)]
