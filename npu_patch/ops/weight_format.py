"""Weights in FRACTAL_NZ, the layout that the cube unit reads: products take the second factor so without laying it out
anew at every call (`aclnnMatmulWeightNz`, `aclnnAddmmWeightNz`, `aclnnGroupedMatmulWeightNz`; half precision;
`aclnnQuantMatmulWeightNz`: int8, which is documented as `[K, N]` there, so a weight `[N, K]` is a view of that).

Shape and strides stay those of the matrix, and so do values; only who reads the memory itself would see another order.
Everything but such products is an operator of old there, which is compiled at the call and in no graph. So a weight
lies so only while nothing but products asks for it: `plain` puts it back before anything else does.

What torch_npu lets a cast do depends on a setting that also makes `module.npu()` cast every linear layer, and copies
keep the format. It is on within a cast and nowhere else: products do not ask for it, and copies come out plain.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from npu_patch.numerics.room import quiet_room
from npu_patch.ops.experts.grouped_matmul import NPU_PRODUCTS
from npu_patch.serving.operators import Operator

ND, FRACTAL_NZ = 2, 29
BLOCK = 16  # rows and columns; other widths are padded, which costs memory
INT8_BLOCK = (32, 16)  # of a weight [N, K]: 32 bytes of each of 16 rows of its transpose
DTYPES = (torch.float16, torch.bfloat16)
CAST = Operator("npu_format_cast")
FORMAT = Operator("get_npu_format")
ALLOWED = "ALLOW_INTERNAL_FORMAT"
LIBRARIES = ("libopapi.so", "libopapi_nn.so", "libopapi_transformer.so")
OF_LINEAR, OF_EXPERTS, OF_INT8 = "aclnnMatmulWeightNz", "aclnnGroupedMatmulWeightNz", "aclnnQuantMatmulWeightNz"

# Layers whose parameters of these names lie so.
HELD: WeakKeyDictionary[Module, tuple[str, ...]] = WeakKeyDictionary()


def lies_in_blocks(tensor: Tensor) -> bool:
    return int(torch.ops.npu.get_npu_format(tensor)) == FRACTAL_NZ


def lay_out(layer: Module, names: Iterable[str]) -> None:
    """Casts these parameters; each stays the object that it is."""
    for name in names:
        parameter = getattr(layer, name)
        parameter.data = _cast(parameter.data)
        HELD[layer] = (*HELD.get(layer, ()), name)


def plain(layer: Module) -> bool:
    """Casts back what lies in blocks of a layer; whether anything did. What somebody put in its place stays."""
    names = HELD.pop(layer, ())
    for name in names:
        parameter = layer._parameters.get(name)
        if parameter is not None and parameter.device.type == "npu" and lies_in_blocks(parameter):
            parameter.data = _cast_back(parameter.data)
    return bool(names)


def as_rows(weight: Tensor) -> Tensor:
    """To be read by what is no product: the weight itself, or a copy of one that lies in blocks."""
    if torch.compiler.is_compiling() or not HELD or weight.device.type != "npu" or not lies_in_blocks(weight):
        return weight
    return _cast_back(weight.detach())


@contextlib.contextmanager
def _internal_formats() -> Iterator[None]:
    """For a cast, whose result is a tensor like any other within inference_mode too."""
    import torch_npu

    before = torch_npu._C._npu_getOption(ALLOWED) or b"disable"
    torch_npu._C._npu_setOption({ALLOWED: "enable"})
    try:
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        torch_npu._C._npu_setOption({ALLOWED: before.decode()})


class CompileMode:
    """Of operators at each call, `jit_compile`: with it on, products are operators of old whatever they take."""

    def switch_off(self) -> bool:
        """Whether it was on."""
        if torch.get_device_module("npu").is_jit_compile_false():
            return False
        torch.get_device_module("npu").set_compile_mode(jit_compile=False)
        return True

    def switch_on(self) -> None:
        torch.get_device_module("npu").set_compile_mode(jit_compile=True)


COMPILE_MODE = CompileMode()


def why_not(device: torch.device, dtype: torch.dtype, function: str) -> str | None:
    """Why products on this device do not take such weights, asked of the device: small integers, of which every sum is
    exact in half precision."""
    missing = CAST.missing() or FORMAT.missing()
    if missing is not None:
        return missing
    if not _has(function):
        return f"this CANN has no {function}: products would be compiled at each call"
    exact = {OF_LINEAR: _linear_is_exact, OF_EXPERTS: _experts_are_exact, OF_INT8: _int8_is_exact}[function]
    with quiet_room(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        off = COMPILE_MODE.switch_off()
        try:
            same = exact(partial(_integers, device, dtype))
        finally:
            if off:
                COMPILE_MODE.switch_on()
    return None if same else f"{function} is wrong on this device in {dtype}"


def _linear_is_exact(integers: Callable[[int, int], Tensor]) -> bool:
    """The product, with a bias, and that of its backward."""
    weight, x, dy, (bias,) = (integers(*size) for size in ((48, 32), (8, 32), (8, 48), (1, 48)))
    laid = _cast(weight)
    pairs = [
        (F.linear(x, weight), F.linear(x, laid)),
        (F.linear(x, weight, bias), F.linear(x, laid, bias)),
        (dy @ weight, dy @ laid),
    ]
    return lies_in_blocks(laid) and all(bool(torch.equal(*pair)) for pair in pairs)


def _experts_are_exact(integers: Callable[[int, int], Tensor]) -> bool:
    """Both ways round, of one weight of all experts."""
    weight = integers(3 * 32, 48).view(3, 32, 48)
    laid, counts = _cast(weight), torch.tensor([3, 0, 5], device=weight.device)
    pairs = []
    for width, turned in ((32, False), (48, True)):
        x = integers(8, width)
        pairs.append(
            [
                NPU_PRODUCTS.by_rows(x, [own.mT if turned else own], counts, None, lambda: counts)
                for own in (weight, laid)
            ]
        )
    return lies_in_blocks(laid) and all(bool(torch.equal(*pair)) for pair in pairs)


def _int8_is_exact(integers: Callable[[int, int], Tensor]) -> bool:
    """The sums, and the weight as it is cast back."""
    weight, x = integers(64, 32), integers(8, 32)
    laid, scale = _cast(weight), torch.ones(64, device=weight.device)
    product = partial(torch.ops.npu.npu_quant_matmul, scale=scale, output_dtype=torch.int32)
    back = torch.equal(_cast_back(laid), weight)
    return lies_in_blocks(laid) and back and bool(torch.equal(product(x, weight.t()), product(x, laid.t())))


def _integers(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    return (torch.arange(rows * columns, device="cpu") * 7 % 5 - 2).view(rows, columns).to(device, dtype)


def _cast(weight: Tensor) -> Tensor:
    turned = _is_turned(weight)
    with _internal_formats():
        laid = torch.ops.npu.npu_format_cast(weight.t().contiguous() if turned else weight, FRACTAL_NZ)
    return laid.t() if turned else laid


def _cast_back(laid: Tensor) -> Tensor:
    turned = _is_turned(laid)
    with _internal_formats():
        weight = torch.ops.npu.npu_format_cast(laid.t() if turned else laid, ND)
    return weight.t().contiguous() if turned else weight


def _is_turned(weight: Tensor) -> bool:
    """Of int8 it is `[K, N]` that lies in blocks."""
    return weight.dtype == torch.int8 and weight.dim() == 2


def _has(function: str) -> bool:
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            if hasattr(ctypes.CDLL(name), function):
                return True
    return False
