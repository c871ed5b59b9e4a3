"""Arithmetic of bfloat16 in triton's interpreter, as `npu_patch.kernels.interpreter` mends it."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic(x_pointer, y_pointer, out_pointer, WHAT: tl.constexpr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    x, y = tl.load(x_pointer + at), tl.load(y_pointer + at)
    if WHAT == "sum":
        out = x + y
    elif WHAT == "product":
        out = x * y
    elif WHAT == "negative":
        out = -x
    elif WHAT == "fused":
        out = tl.fma(x, y, x)
    else:
        out = tl.where(x < y, x, y)
    tl.store(out_pointer + at, out)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("sum", lambda x, y: x + y),
        ("product", lambda x, y: x * y),
        ("negative", lambda x, y: -x),
        ("fused", lambda x, y: (x.float() * y.float() + x.float()).bfloat16()),
        ("smaller", torch.minimum),
    ],
)
def test_bfloat16_is_computed_as_numbers(what: str, expected: object) -> None:
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.empty_like(x)
    _arithmetic[(1,)](x, y, out, what, 64)
    assert torch.equal(out, expected(x, y))
