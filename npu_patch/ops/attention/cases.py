"""What of the attention operators is checked on a device before they serve a model: each form of a call.

Lengths cross the blocks of the kernels: 128 queries, and for single queries 512 keys, beyond which an operator was seen
to forget its mask (https://github.com/vllm-project/vllm-ascend/issues/15503).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from npu_patch.numerics.values import values
from npu_patch.ops.attention import decode as attention_decode
from npu_patch.ops.attention.band import CAUSAL_TOP_LEFT, Band, nothing_kept
from npu_patch.ops.attention.call import Attention
from npu_patch.ops.attention.op import ATTENTION, SINGLE, SINGLE_MASKED
from npu_patch.serving.case import ALLOWED_OF_PRODUCTS, Case
from npu_patch.serving.implementation import dtype_name

SQUARE, MANY_KEYS, CACHES = (132,), (700,), (40, 700, 1100)
FEW_QUERIES = 20
WIDEST = 2048  # of all heads together: more of them compute the same
WINDOW = 50

# By form: at how many keys, how many queries (None: as many), and what is asked for, given the masks of those sizes.
_Ask = Callable[[float, Tensor, Tensor], Attention]
_FORMS: dict[str, tuple[tuple[int, ...], int | None, _Ask]] = {
    "full": (SQUARE, None, lambda scale, hidden, bias: Attention(scale)),
    "causal": (SQUARE, None, lambda scale, hidden, bias: Attention(scale, CAUSAL_TOP_LEFT)),
    "causal to the last key": (MANY_KEYS, FEW_QUERIES, lambda scale, hidden, bias: Attention(scale, Band(after=0))),
    "window": (SQUARE, None, lambda scale, hidden, bias: Attention(scale, Band(WINDOW, 0))),
    "packed": (SQUARE, None, lambda scale, hidden, bias: Attention(scale, Band(after=0), ends=_ends(hidden.shape[-1]))),
    "mask": (MANY_KEYS, FEW_QUERIES, lambda scale, hidden, bias: Attention(scale, hidden=hidden)),
    "bias": (SQUARE, None, lambda scale, hidden, bias: Attention(scale, hidden=hidden, bias=bias)),
    SINGLE: (CACHES, 1, lambda scale, hidden, bias: Attention(scale, decodes=True)),
    SINGLE_MASKED: (CACHES, 1, lambda scale, hidden, bias: Attention(scale, hidden=hidden, decodes=True)),
}
# Those whose inputs do not grow with the square of the length: one large image, causal text, several images.
_TIMED_TOKENS = {"full": 4096, "causal": 4096, "packed": 8192}
_WITH_SINKS = ("causal", "window", "packed", "mask")
_SAMPLES = 2


def cases(heads: int, key_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype, sinks: bool) -> Iterator[Case]:
    """Of one kind of layer. `sinks`: it has them."""
    shared = heads // key_heads
    key_heads = max(1, min(key_heads, WIDEST // (shared * head_dim)))
    for form in _FORMS:
        for with_sinks in {False, sinks and form in _WITH_SINKS}:
            yield _case(form, (shared * key_heads, key_heads), (head_dim, value_dim), dtype, with_sinks)


def _case(form: str, all_heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype, sinks: bool) -> Case:
    lengths, few, ask = _FORMS[form]
    (heads, key_heads), (head_dim, value_dim) = all_heads, widths
    packed, single = form == "packed", form in (SINGLE, SINGLE_MASKED)
    samples = _SAMPLES if single or form in ("mask", "bias") else 1

    def inputs(keys: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        queries = few or keys
        shapes = [(queries, heads, head_dim), (keys, key_heads, head_dim), (keys, key_heads, value_dim)]
        others: list[tuple[tuple[int, ...], torch.dtype]] = [((heads,), dtype)] if sinks else []
        if form == "bias":
            others.append(((1, heads, queries, keys), dtype))
        return [((samples, *shape), dtype) for shape in shapes] + others

    def asked(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Any, ...]:
        """As models have them: `[B, N, S, D]`, `[B, S, N, D]` in memory but in a cache."""
        queries, keys = query.shape[1], key.shape[1]
        hidden = _hidden(queries, keys).to(query.device)
        attention = ask(head_dim**-0.5, hidden, others[-1] if others else hidden)
        attention = replace(attention, sink=others[0] if sinks else None)
        if packed:
            return *(tensor.flatten(0, 1) for tensor in (query, key, value)), attention
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        return query, *(tensor.contiguous() if single else tensor for tensor in (key, value)), attention

    def call(function: Callable[..., Any], *tensors: Tensor) -> Any:
        with nothing_kept():
            return function(*asked(*tensors))

    named = f"{form} by {attention_decode.OPERATOR.name}" if single else form
    and_sinks, precision = ", sinks" if sinks else "", dtype_name(dtype)
    width = str(head_dim) if value_dim == head_dim else f"{head_dim} and {value_dim}"
    return Case(
        ATTENTION,
        f"{named}{and_sinks}, {heads} and {key_heads} heads of {width} {precision}",
        inputs,
        call,
        tokens=lengths,
        allowed=ALLOWED_OF_PRODUCTS,
        differentiated=not single,
        timed_tokens=_TIMED_TOKENS.get(form, 0),
    )


def _hidden(queries: int, keys: int) -> Tensor:
    """`[B, 1, Sq, Skv]`: a third of the keys, all along; never the first, so that each query sees one."""
    hidden = values((_SAMPLES, 1, 1, keys), 5) > 0.4
    if queries > 1:
        hidden = hidden ^ (values((1, 1, queries, 1), 6) > 1.0)
    hidden[..., 0] = False
    return hidden.expand(_SAMPLES, 1, queries, keys)


def _ends(tokens: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of packed sequences: a short one, one beyond a block, and the rest."""
    ends = (3, tokens // 3, tokens)
    return ends, ends
