"""FRACTAL_NZ: a matrix as the cube unit reads it, in blocks of 16 rows by 32 bytes, column of blocks by column.

torch_npu marks such a tensor by its format (29) and leaves its shape and strides those of the matrix: whoever reads its
memory by these reads other elements. Few operators take one. Which, was found by asking torch_npu 2.13's own dispatch,
over a CANN that has every function: a product's second factor in half precision reaches aclnnMatmulWeightNz,
aclnnAddmmWeightNz or aclnnGroupedMatmulWeightNz; everything else is an operator of old, which is compiled at the call
and in no graph, or reads a slice as if it lay in rows. Those are refused here.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
import torch_npu
from torch import Tensor

from .refusal import HALF, require, short

ND, FRACTAL_NZ = 2, 29
BLOCK_ROWS, BLOCK_BYTES = 16, 32
FEWEST_COLUMNS = 16  # of a block, whose elements are wider than 2 bytes

# Which argument may lie so.
TAKEN = {
    "aten::mm": 1,
    "aten::addmm": 2,
    "aten::addmm_": 2,
    "aten::linear": 1,
    "aten::matmul": 1,
    "aten::matmul_backward": 2,  # composed of products
    "npu::npu_grouped_matmul": 1,
    "npu::npu_quant_matmul": 1,
}
OF_INT8 = {"npu::npu_grouped_matmul", "npu::npu_quant_matmul"}  # documented, not asked
# These take its values as a matrix: they cast first, by an operator of old.
COPIES = {"aten::copy_", "aten::clone", "npu::_npu_format_cast"}

laid_out: dict[int, torch.Size] = {}  # address -> shape of what was laid out so there; it may be gone


def is_fractal(tensor: Tensor) -> bool:
    """Whether it lies so; nothing is asked before anything does."""
    if not laid_out or tensor.device.type != "npu" or tensor.untyped_storage().data_ptr() not in laid_out:
        return False
    try:
        return bool(torch_npu.get_npu_format(tensor) == FRACTAL_NZ)
    except RuntimeError:  # a storage that torch made over the memory has no format: its bytes are what is asked for
        return False


def require_taken(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
    """Refuse an operator that was given such a tensor and does not take one there."""
    if name in COPIES:
        return
    for place, value in [*enumerate(args), *kwargs.items()]:
        for tensor in _tensors(value):
            if is_fractal(tensor):
                require(
                    TAKEN.get(name) == place,
                    name,
                    f"a tensor {list(tensor.shape)} in FRACTAL_NZ, which only the second factor of a product may be: "
                    "cast it back with torch_npu.npu_format_cast(tensor, 2)",
                )
                require(
                    tensor.dtype in HALF or (tensor.dtype == torch.int8 and name in OF_INT8),
                    name,
                    f"a factor in FRACTAL_NZ in {short(tensor.dtype)}, not half",
                )


def matrix(tensor: Tensor, memory: Tensor) -> Tensor:
    """The values of such a tensor, whose storage `memory` is, with its strides."""
    size = laid_out[tensor.untyped_storage().data_ptr()]
    strides = torch.empty(size, device="meta").stride()
    whole = tensor.storage_offset() == 0 and sorted(tensor.shape[-2:]) == sorted(size[-2:])
    turned = whole and tensor.mT.shape == size and tensor.mT.stride() == strides
    require(
        turned or (whole and tensor.shape == size and tensor.stride() == strides),
        "FRACTAL_NZ",
        f"a view {list(tensor.shape)} of a tensor {list(size)}: only the whole of it and its transpose are views that "
        "do not read the memory as rows",
    )
    *batch, rows, columns = size
    by_row, by_column = blocks_of(tensor.dtype)
    blocks = memory.view(*batch, columns // by_column + (columns % by_column > 0), -1, by_row, by_column)
    plain = blocks.movedim(-4, -2).flatten(-4, -3).flatten(-2, -1)[..., :rows, :columns].contiguous()
    return plain.mT if turned else plain


def blocks(values: Tensor) -> Tensor:
    """The memory of a tensor that holds the values, zeros where a block is not full."""
    rows, columns = values.shape[-2:]
    by_row, by_column = blocks_of(values.dtype)
    padded = F.pad(values, (0, -columns % by_column, 0, -rows % by_row))
    return padded.unflatten(-1, (-1, by_column)).unflatten(-3, (-1, by_row)).movedim(-2, -4).flatten()


def blocks_of(dtype: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a block."""
    return BLOCK_ROWS, max(FEWEST_COLUMNS, BLOCK_BYTES // dtype.itemsize)


def _tensors(value: object) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
