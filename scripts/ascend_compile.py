"""Compiles Triton kernels for an Ascend chip on any machine, up to the code generator that only CANN has.

`triton-ascend` lowers a kernel to Linalg and `bishengir-compile` (the package ascendnpu-ir) fuses it, tiles it, chooses
vector instructions and plans on-chip memory. Its last step needs CANN's closed `hivmc`; by then the planned module has
been saved, and that is what is read here. A kernel that needs more on-chip memory than a core has is refused, in the
words a user of the chip would see.
"""

from __future__ import annotations

import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from npu_patch.kernels import launch

CHIP = "Ascend910B3"
CORES = 40  # vector cores of that chip
PLANNED = "module.hivm.opt.mlir"
FLAGS = (
    "--enable-auto-bind-sub-block=true",
    "--enable-hfusion-compile=true",
    "--enable-hivm-compile=true",
    "--enable-triton-kernel-compile=true",
)
_FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_POINTEES = _FLOATS | {torch.int32: "i32", torch.int64: "i64"}
_BYTES = {"i1": 1, "i8": 1, "i16": 2, "f16": 2, "bf16": 2, "i32": 4, "f32": 4, "i64": 8, "f64": 8}


@dataclass(frozen=True)
class Launch:
    """A kernel as one launch specializes it: the types of its arguments and the values of its constants."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return f"{self.kernel.__module__.rpartition('.')[2]}.{self.kernel.__name__}"


@dataclass(frozen=True)
class Plan:
    """What the compiler made of a launch.

    `on_chip_bytes` is the end of the highest buffer in the unified buffer, and `double_buffered` whether copies overlap
    with arithmetic: the compiler gives that up, with a note, where it lacks the room. `scalar_loops` are accesses to
    single elements of memory: a tensor operation for which no vector instruction was found. `refusal` is the compiler's
    error.
    """

    on_chip_bytes: int
    double_buffered: bool
    scalar_loops: tuple[str, ...]
    instructions: tuple[str, ...]
    refusal: str | None


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Within it, kernels are not run but recorded, tiled for an Ascend chip. Give them tensors of the meta device."""
    found: list[Launch] = []
    machine = launch.Machine("npu", CORES, launch.UNIFIED_BUFFER, exact_widths=True)
    kept = launch.machine_of, launch.launch

    def record(kernel: Any, device: torch.device, grid: int, *arguments: Any, num_warps: int = 0, **constants: Any):
        names = kernel.arg_names[: len(arguments)]
        typed = [(name, type_name(value)) for name, value in zip(names, arguments, strict=True) if value is not None]
        absent = [(name, None) for name, value in zip(names, arguments, strict=True) if value is None]
        found.append(Launch(kernel, tuple(typed), (*absent, *constants.items())))

    launch.machine_of, launch.launch = (lambda device: machine), record
    try:
        yield found
    finally:
        launch.machine_of, launch.launch = kept


def lower(one: Launch, chip: str = CHIP) -> str:
    """The kernel as Linalg."""
    from triton._C.libtriton import ir
    from triton.backends.ascend.compiler import AscendBackend, make_ttir, ttir_to_linalg
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target = GPUTarget("npu", chip, 0)
    backend = AscendBackend(target)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(fn=one.kernel, signature=dict(one.signature), constants=dict(one.constants))
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    metadata = dict(options.__dict__, target=target)
    linalg = ttir_to_linalg(make_ttir(module, metadata, options), metadata, options, named_ops=True)
    return re.sub(r', mix_mode\s*=\s*"[^"]*"', "", linalg)


def plan(linalg: str, chip: str = CHIP, *, multi_buffer: bool = True) -> Plan:
    """Runs every pass up to the closed code generator. `multi_buffer`: triton-ascend's option of a launch."""
    compiler = Path(importlib.import_module("ascendnpuir").__file__).parent / "bin" / "bishengir-compile"
    with tempfile.TemporaryDirectory() as folder:
        source, planned = Path(folder, "kernel.mlir"), Path(folder, PLANNED)
        source.write_text(linalg)
        flags = [f"--target={chip}", f"--enable-auto-multi-buffer={str(multi_buffer).lower()}", *FLAGS]
        command = [compiler, source, *flags, f"--save-temps={folder}", "-o", Path(folder, "out")]
        run = subprocess.run(command, capture_output=True, text=True)
        log = run.stdout + run.stderr
        if not planned.exists():
            error = re.search(r"error: (.*overflow.*)", log) or re.search(r"error: (.*)", log)
            return Plan(0, False, (), (), error.group(1) if error else log[-500:])
        module = planned.read_text()
    single = "set enable-auto-multi-buffer to false" in log
    return Plan(on_chip_bytes(module), not single, tuple(scalar_loops(module)), tuple(instructions(module)), None)


def on_chip_bytes(module: str) -> int:
    """The end of the highest buffer that a planned module places in the unified buffer."""
    offsets = {name: int(value) for name, value in re.findall(r"(%\S+) = arith\.constant (\d+) : i64", module)}
    ends = [0]
    for offset, shape in re.findall(
        r"pointer_cast\((%\S+?)\)[^:\n]*: memref<([^,>]+), #hivm\.address_space<ub>>", module
    ):
        *extents, kind = shape.split("x")
        elements = 1
        for extent in extents:
            elements *= int(extent)
        ends.append(offsets[offset] + elements * _BYTES[kind])
    return max(ends)


def scalar_loops(module: str) -> Iterator[str]:
    """Accesses of single elements at an index that a loop varies, each as the line that makes it."""
    for line in module.splitlines():
        access = re.search(r"memref\.(?:load|store) [^\[]*\[([^\]]*)\]", line)
        if access and not all(re.fullmatch(r"%c\d+(?:_\d+)?", index) for index in access.group(1).split(", ") if index):
            yield line.strip()


def instructions(module: str) -> list[str]:
    """The names of the vector and copy routines that the module calls."""
    return sorted(set(re.findall(r"call @(\w+)\(", module)))


def type_name(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _POINTEES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    return "fp32" if isinstance(value, float) else "i32" if -(2**31) <= value < 2**31 else "i64"
