"""Makes triton's interpreter treat bfloat16 as every device does.

The interpreter (`TRITON_INTERPRET=1`, kernels on the CPU) cuts off the low bits of a float32 that becomes a bfloat16:
twice the error of rounding to nearest, and a bias. (triton-ascend 3.2.0, runtime/interpreter.py, `_convert_float`.)
And it computes with the bits of bfloat16 values as if they were integers. (The same file, `create_dot`, `binary_op`,
`unary_op`, `create_fma`.) Here they are widened, and the result is rounded, as in a vector unit without bfloat16.
"""

from __future__ import annotations

from typing import Any

import torch


def round_to_nearest() -> None:
    """Replaces the interpreter's conversions and arithmetic of bfloat16. Calling it again does nothing."""
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    kept = interpreter._convert_float
    if getattr(kept, "rounds_to_nearest", False):
        return

    def convert(input: Any, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> Any:
        if (input_dtype, output_dtype) == (tl.float32, tl.bfloat16):
            wide = torch.frombuffer(bytearray(input.tobytes()), dtype=torch.float32)
            return wide.bfloat16().view(torch.int16).numpy().view(numpy.uint16).reshape(input.shape)
        if (input_dtype, output_dtype) == (tl.bfloat16, tl.float32):
            return numpy.frombuffer(input.tobytes(), numpy.uint16).astype(numpy.uint32).reshape(input.shape) << 16
        return kept(input, input_dtype, output_dtype, rounding_mode)

    vars(convert)["rounds_to_nearest"] = True
    interpreter._convert_float = convert
    builder = interpreter.InterpreterBuilder
    multiply, unary, binary, fused = builder.create_dot, builder.unary_op, builder.binary_op, builder.create_fma

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return multiply(self, widened(a), widened(b), *rest)

    def unary_op(self: Any, value: Any, op: Any) -> Any:
        return narrowed(unary(self, widened(value), op), value)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        return narrowed(binary(self, widened(a), widened(b), op), a)

    def create_fma(self: Any, a: Any, b: Any, c: Any) -> Any:
        return narrowed(fused(self, widened(a), widened(b), widened(c)), a)

    def widened(tile: Any) -> Any:
        if tile.dtype.scalar != tl.bfloat16:
            return tile
        wide = convert(tile.data, tl.bfloat16, tl.float32, None).view(numpy.float32)
        return interpreter.TensorHandle(wide, tl.float32)

    def narrowed(result: Any, like: Any) -> Any:
        if like.dtype.scalar != tl.bfloat16 or result.data.dtype == bool:  # a comparison
            return result
        wide = numpy.asarray(result.data, numpy.float32)
        return interpreter.TensorHandle(convert(wide, tl.float32, tl.bfloat16, None), tl.bfloat16)

    builder.create_dot, builder.unary_op, builder.binary_op, builder.create_fma = (
        create_dot,
        unary_op,
        binary_op,
        create_fma,
    )
