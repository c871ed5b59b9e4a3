"""Rotary position embedding: `y = x * cos + rotate(x) * sin` (https://arxiv.org/abs/2104.09864).

Modeling files differ in which elements form a pair, in how wide the cos and sin tables are, in the dtype they compute
in and return, and in whether only the first dimensions of a head are rotated. `rotate` computes any of them with one
kernel per tensor, forward and backward, and keeps nothing for the backward but the tables.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.autograd import Context
from npu_patch.numerics.results import changeable
from npu_patch.numerics.rotation import HALF, INTERLEAVE, rotate_pairs, table_gradients
from npu_patch.numerics.values import values
from npu_patch.ops.rope_tables import sines_back
from npu_patch.serving.case import Case
from npu_patch.serving.implementation import Implementation, dtype_name, is_plain, layout, needs_operators
from npu_patch.serving.op import Op
from npu_patch.serving.operators import Operator

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NPU_ROTARY_MUL = Operator("npu_rotary_mul", ("rotary_mode",))  # _Rotate is its derivative


@dataclass(frozen=True)
class Table:
    """How the given cos (or sin) becomes as wide as what it rotates; `half` as wide is how it is given, or as wide."""

    name: str
    widen: Callable[[Tensor], Tensor]
    half: bool = False

    def width(self, rotary_dim: int) -> int:
        """The given width."""
        return rotary_dim // 2 if self.half else rotary_dim


TABLES: tuple[Table, ...] = (
    Table("full table", lambda table: table),
    Table("halves of the table", lambda table: _doubled(_first_half(table))),
    Table("pairs of the table", lambda table: _first_half(table).repeat_interleave(2, -1)),
    Table("half table", lambda table: _doubled(table), half=True),
    Table("half table in pairs", lambda table: table.repeat_interleave(2, -1), half=True),
)


@dataclass(frozen=True)
class RoPEVariant:
    """A function that `apply_rotary_pos_emb` computes.

    `pairing`: "half" pairs element i with i + D/2, "interleave" 2i with 2i + 1. `deinterleaved`: the input's pairs are
    first moved to its halves. `negated`: it rotates the other way round. `output`: the dtype returned, "input" or
    "promoted" (of input and table).
    """

    pairing: str
    table: Table
    deinterleaved: bool = False
    negated: bool = False
    output: str = "promoted"

    def __post_init__(self) -> None:
        for what, value, accepted in (
            ("pairing", self.pairing, (HALF, INTERLEAVE)),
            ("output", self.output, ("input", "promoted")),
        ):
            if value not in accepted:
                raise ValueError(f"RoPE: {what} is {value!r}; accepted are {', '.join(accepted)}")

    @property
    def name(self) -> str:
        parts = [self.pairing]
        parts += [] if self.table is TABLES[0] else [self.table.name]
        parts += ["de-interleaved"] if self.deinterleaved else []
        parts += ["negated"] if self.negated else []
        return ", ".join([*parts, f"{self.output} dtype"])

    def reference(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Plain torch, in the promoted dtype; what lies beyond the width of the table passes through."""
        cos, sin = self.table.widen(cos), self.table.widen(sin)
        dtype = torch.promote_types(x.dtype, cos.dtype)
        rotated, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.deinterleaved:
            rotated = deinterleave(rotated)
        y = rotated * cos + rotate_pairs(rotated, self.pairing) * (-sin if self.negated else sin)
        return torch.cat((y, passed.to(y.dtype)), -1).to(x.dtype if self.output == "input" else dtype)


VARIANTS: tuple[RoPEVariant, ...] = tuple(
    RoPEVariant(pairing, table, deinterleaved, negated)
    for negated in (False, True)
    for deinterleaved, table, pairing in itertools.product((False, True), TABLES, (HALF, INTERLEAVE))
)


# Each of the tensors with its pairs turned, by tables as wide as their heads.
Kernel = Callable[[Sequence[Tensor], Tensor, Tensor, str], list[Tensor]]


def rotate(
    kernel: Kernel, tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, variant: RoPEVariant
) -> Sequence[Tensor]:
    """`variant` of each of `tensors`, one or two (`[B, N, S, D]`, `[B, S, N, D]` or `[T, N, D]`).

    cos and sin have as many dimensions as the tensors, one head, and the variant's table width, at most D. That is how
    the op is called.
    """
    cos, sin = variant.table.widen(cos), variant.table.widen(sin)
    if variant.negated:
        sin = -sin
    if variant.deinterleaved:
        tensors = [_deinterleave_first(tensor, cos.shape[-1]) for tensor in tensors]
    first, second = tensors if len(tensors) == 2 else (tensors[0], None)
    its_dtype = cos.dtype
    if first.dtype == its_dtype and (second is None or second.dtype == its_dtype):
        # Nothing is cast: the host's shortest way.
        return _rotated(kernel, variant.pairing, cos, sin, first, second)
    dtypes = [torch.promote_types(tensor.dtype, its_dtype) for tensor in tensors]
    # The operator casts the tables to the dtype of the input: a float32 table beside a bfloat16 input needs the
    # input in float32, or it would lose what the original keeps.
    tensors_cast = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    rotated: Sequence[Tensor]
    if len(set(dtypes)) == 1:
        cos, sin = cos.to(dtypes[0]), sin.to(dtypes[0])
        rotated = _rotated(kernel, variant.pairing, cos, sin, *tensors_cast)
    else:  # a caller that mixes them
        rotated = [
            y
            for tensor, dtype in zip(tensors_cast, dtypes, strict=True)
            for y in _rotated(kernel, variant.pairing, cos.to(dtype), sin.to(dtype), tensor)
        ]
    if variant.output == "input":
        rotated = [y.to(tensor.dtype) for y, tensor in zip(rotated, tensors, strict=True)]
    return rotated


def _rotated(
    kernel: Kernel, pairing: str, cos: Tensor, sin: Tensor, first: Tensor, second: Tensor | None = None
) -> tuple[Tensor, ...]:
    rotated: tuple[Tensor, ...] = _Rotate.apply(kernel, pairing, cos, sin, first, second)
    return rotated


def deinterleave(x: Tensor) -> Tensor:
    """Elements 0, 2, 4, ... and then 1, 3, 5, ..."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def mix_sections(table: Tensor, sections: Sequence[int]) -> Tensor:
    """M-RoPE: from `[3, B, S, D]`, for temporal, height and width positions, the table `[B, S, D]`.

    `sections` says how many pairs follow each of the three (https://arxiv.org/abs/2409.12191, section 2.1).
    """
    parts = table.split(list(sections) * 2, dim=-1)
    return torch.cat([part[index % 3] for index, part in enumerate(parts)], -1)


class _Rotate(torch.autograd.Function):
    """The transpose of a rotation is the rotation by the negative angle, so the backward is the forward's kernel.

    Exactly: dx = dy * cos - rotate(swap(sin) * dy'), where swap exchanges the two sines of a pair. They are equal in
    every table that comes from angles; nothing here depends on it.
    """

    # Not `*tensors`: without gradients Dynamo takes ctx away where it counts as many arguments as parameters.
    @staticmethod
    def forward(
        ctx: Context, kernel: Kernel, pairing: str, cos: Tensor, sin: Tensor, first: Tensor, second: Tensor | None
    ) -> tuple[Tensor, ...]:
        tensors = (first,) if second is None else (first, second)
        ctx.kernel, ctx.pairing = kernel, pairing
        needs = ctx.needs_input_grad
        tables_need = needs[2] or needs[3]
        ctx.save_for_backward(cos, sin, *(tensors if tables_need else ()))
        rotated = tuple([changeable(y) for y in _rotate_first(kernel, tensors, cos, sin, pairing)])
        if not tables_need:  # k of a frozen projection has no gradient because it is rotated together with q
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*[y for y, need in zip(rotated, needs[4:], strict=False) if not need])
        return rotated

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *tensors = ctx.saved_tensors
        back = sines_back(sin, ctx.pairing)
        needs_cos, needs_sin, *needed = ctx.needs_input_grad[2:]
        needed = [need and grad is not None for need, grad in itertools.zip_longest(needed, grads)]
        asked = [grad for grad, need in zip(grads, needed, strict=False) if need]
        turned_back = iter(_rotate_first(ctx.kernel, asked, cos, back, ctx.pairing))
        inputs = [next(turned_back) if need else None for need in needed]
        d_cos, d_sin = (
            table_gradients(list(zip(grads, tensors, strict=True)), cos, ctx.pairing) if tensors else (None,) * 2
        )
        return None, None, d_cos if needs_cos else None, d_sin if needs_sin else None, *inputs


def _rotate_first(kernel: Kernel, tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, pairing: str) -> list[Tensor]:
    """Rotates as many elements of each head as the table is wide; the rest passes through."""
    width = cos.shape[-1]
    narrower = [x if x.shape[-1] == width else x[..., :width] for x in tensors]
    rotated = kernel(narrower, cos, sin, pairing)
    return [
        y if y.shape[-1] == x.shape[-1] else torch.cat((y, x[..., width:]), -1)
        for y, x in zip(rotated, tensors, strict=True)
    ]


def _deinterleave_first(x: Tensor, width: int) -> Tensor:
    return deinterleave(x) if width == x.shape[-1] else torch.cat((deinterleave(x[..., :width]), x[..., width:]), -1)


def _first_half(table: Tensor) -> Tensor:
    return table[..., : table.shape[-1] // 2]


def _doubled(table: Tensor) -> Tensor:
    return torch.cat((table, table), -1)


def _npu_rotary_mul(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, pairing: str) -> list[Tensor]:
    """The operator reads its layout from shapes alone. Projections come as `[B, S, N, D]` seen as `[B, N, S, D]`:
    handing over the former saves the copy that the operator would make."""
    tables_turned: tuple[Tensor, Tensor] | None = None
    rotated: list[Tensor] = []
    for x in tensors:
        if x.dim() != 4 or x.is_contiguous() or not (turned := x.transpose(1, 2)).is_contiguous():
            rotated.append(_rotary_mul(x, cos, sin, pairing))
            continue
        tables_turned = tables_turned or (cos.transpose(1, 2), sin.transpose(1, 2))
        rotated.append(_rotary_mul(turned, *tables_turned, pairing).transpose(1, 2))
    return rotated


def _rotary_mul(x: Tensor, cos: Tensor, sin: Tensor, pairing: str) -> Tensor:
    if pairing == HALF and _block_skip_is_refused(x, cos):
        shape = (x.shape[0], *cos.shape[1:])
        cos, sin = cos.expand(shape).contiguous(), sin.expand(shape).contiguous()
    rotated: Tensor = torch.ops.npu.npu_rotary_mul(x, cos, sin, rotary_mode=pairing)
    return rotated


def _block_skip_is_refused(x: Tensor, cos: Tensor) -> bool:
    """rope_rotate_half_tiling.cpp, CheckBnsdBlockSkip: `[B, N, S, D]` with one table `[1, 1, S, D]` for several
    samples is an error for short sequences. For rows that are not a multiple of 32 bytes the limit depends on the
    number of cores: always avoided."""
    if x.dim() != 4 or x.shape[0] == 1 or cos.shape[:2] != (1, 1) or cos.shape[2] == 1:
        return False
    aligned = (x.shape[-1] // 2) % (32 // x.element_size()) == 0
    return not aligned or x.shape[0] * x.shape[1] > 8 * x.shape[2]


def _torch_rotary_mul(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, pairing: str) -> list[Tensor]:
    cos, sin = cos.float(), sin.float()
    wide = [x.float() for x in tensors]
    return [(x32 * cos + rotate_pairs(x32, pairing) * sin).to(x.dtype) for x, x32 in zip(tensors, wide, strict=True)]


def _unsupported_anywhere(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, variant: RoPEVariant) -> str | None:
    """cos and sin as `rotate` takes them, before the table is widened."""
    device = cos.device
    for x in (*tensors, cos, sin):
        if not is_plain(x):
            return "tensor subclass"
        if x.device != device or x.dtype not in FLOAT_DTYPES or x.numel() == 0:
            return f"{x.dtype}, {layout(x)}, on {x.device.type}"
    shape, width = cos.shape, rotary_dim(cos, variant)
    same = shape == sin.shape and len(shape) in (3, 4) and width % 2 == 0
    for x in tensors:
        if not same or x.dim() != len(shape) or width > x.shape[-1]:
            return f"tables of another shape: {layout(cos)}, for an input of {layout(x)}"
    return None


def _unsupported_on_npu(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, variant: RoPEVariant) -> str | None:
    """Limits of npu_rotary_mul (operator documentation): rows under 896 elements, batch and heads under 1000, a table
    with one head and the input's length; interleaved pairs only with one table for all samples and B * N < 1000."""
    reason = _unsupported_anywhere(tensors, cos, sin, variant)
    if reason is not None:
        return reason
    width = rotary_dim(cos, variant)
    if width >= 896:
        return f"{width} rotated dimensions, the operator takes fewer than 896"
    table = cos.shape
    table_batch = table[0] if len(table) == 4 else 1
    for x in tensors:
        batch = x.shape[0] if len(table) == 4 else 1
        heads = _heads(x.shape, table)
        if heads is None or table_batch not in (1, batch):
            return f"tables of another shape: {layout(cos)}, for an input of {layout(x)}"
        if batch >= 1000 or heads >= 1000:
            return f"batch {batch} and {heads} heads, the operator takes fewer than 1000"
        if variant.pairing == INTERLEAVE and (table_batch != 1 or batch * heads >= 1000):
            return "interleaved pairs with a table for each sample or 1000 rows of heads"
    return None


def _heads(shape: torch.Size, table: torch.Size) -> int | None:
    """How many heads the input has where the table has one, its other dimensions being equal."""
    if len(shape) == 4 and table[-3] == 1 and table[-2] == shape[-2]:
        return shape[-3]
    return shape[-2] if table[-2] == 1 and table[-3] == shape[-3] else None


def rotary_dim(cos: Tensor, variant: RoPEVariant) -> int:
    """How many elements of a head a table rotates."""
    return cos.shape[-1] * 2 if variant.table.half else cos.shape[-1]


def _exact(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, variant: RoPEVariant) -> Sequence[Tensor]:
    return [variant.reference(x, cos, sin) for x in tensors]


def _key(tensors: Sequence[Tensor], cos: Tensor, sin: Tensor, variant: RoPEVariant) -> Hashable:
    """How wide a head is, how much of it is rotated, in which dtype. q and k are as wide as each other: the tables
    are."""
    x = tensors[0]
    return x.shape[-1], rotary_dim(cos, variant), torch.promote_types(x.dtype, cos.dtype)


_by_npu, _by_torch = partial(rotate, _npu_rotary_mul), partial(rotate, _torch_rotary_mul)
ROPE: Op[[Sequence[Tensor], Tensor, Tensor, RoPEVariant], Sequence[Tensor]] = Op(
    "rope",
    (
        Implementation(
            "torch_npu.npu_rotary_mul", ("npu",), _by_npu, _unsupported_on_npu, needs_operators(NPU_ROTARY_MUL)
        ),
        Implementation("torch, float32", ("cuda", "cpu"), _by_torch, _unsupported_anywhere),
    ),
    _key,
    _exact,
    VARIANTS,
)


def case(variant: RoPEVariant, heads: int, head_dim: int, rotary: int, dtype: torch.dtype) -> Case:
    """`[2, N, S, D]` as models have it, `[2, S, N, D]` in memory, with one table for both samples."""

    def tables(tokens: int) -> list[Tensor]:
        """Of angles, in the dtype of the call: what is rounded in them is rounded for everyone."""
        width = variant.table.width(rotary)
        places = torch.frombuffer(bytearray(range(tokens)), dtype=torch.uint8).view(1, 1, -1, 1)
        angles = places.double() * 10000.0 ** -(values((width,), 7).double().abs() % 1.0)
        return [table.to(dtype) for table in (angles.cos(), angles.sin())]

    def call(function: Callable[..., Any], *inputs: Tensor) -> Any:
        (x,) = inputs
        cos, sin = (table.to(x.device, x.dtype) for table in tables(x.shape[1]))
        return function([x.transpose(1, 2)], cos, sin, variant)

    part = "" if rotary == head_dim else f", {rotary} rotated"
    return Case(
        ROPE,
        f"{variant.name}, {heads} heads of {head_dim}{part} {dtype_name(dtype)}",
        lambda tokens: [((2, tokens, heads, head_dim), dtype)],
        call,
    )
