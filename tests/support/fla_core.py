"""The genuine fla-core with its Ascend backend, on the simulated NPU: computed in triton's interpreter, or recorded and
given to the vendor's compiler for a real chip.

python -m tests.support.fla_core run        # what the self-check says of its functions, as JSON
python -m tests.support.fla_core compile    # what the compiler says of its kernels at the sizes of Qwen3-Next, as JSON
"""

from __future__ import annotations

import builtins
import importlib
import itertools
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from npu_patch import simulator

if __name__ == "__main__":  # triton reads the first where it is imported
    os.environ["TRITON_INTERPRET"] = "1" if sys.argv[1:] == ["run"] else "0"
    os.environ["ASCEND_UB_CAPACITY_BITS"] = str(192 * 1024 * 8)  # of the unified buffer of Ascend910B3
    simulator.start()

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from npu_patch.kernels.interpreter import round_to_nearest
from npu_patch.ops.gated_delta import fla
from npu_patch.ops.gated_delta.calls import ConvolutionCall, RuleCall
from npu_patch.probe.gated_delta_checks import VERDICTS, why_wrong
from npu_patch.probe.gated_delta_reference import recurrence
from scripts.ascend_compile import CHIP, Launch, lower, plan, type_name

WITH_KERNELS = (
    "fla.ops.gated_delta_rule.backends.triton_ascend",
    "fla.ops.common.backends.triton_ascend",
    "fla.ops.utils.triton_ascend",
    "fla.modules.norm.triton_ascend",
    "fla.modules.causal_conv1d.backends.triton_ascend",
)


def present_npu(cores: int) -> None:
    """fla asks triton's driver what device there is. There is none without CANN, and nothing is launched by it."""
    properties = {"num_aicore": cores, "num_vectorcore": 2 * cores, "max_shared_mem": 192 * 1024}
    driver = SimpleNamespace(
        get_current_target=lambda: triton.backends.compiler.GPUTarget("npu", CHIP, 0),
        get_benchmarker=lambda: lambda *args, **kwargs: 0.0,
        get_current_device=lambda: 0,
        get_device_interface=lambda: torch.npu,
        get_active_torch_device=lambda: torch.device("npu", 0),
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    triton.runtime.driver.set_active(driver)


def modules_with_kernels() -> Iterator[Any]:
    for name in WITH_KERNELS:
        module = importlib.import_module(name)
        yield module
        for inner in pkgutil.iter_modules(getattr(module, "__path__", ())):
            yield importlib.import_module(f"{name}.{inner.name}")


def complete_interpreter() -> None:
    """What triton-ascend 3.2.0's interpreter lacks of its own compiler: tensors as loop variables, slices of tensors,
    the compiler's options at a launch."""
    round_to_nearest()
    inside: list[Any] = []
    execute, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang_core

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = {name: value for name, value in kwargs.items() if name in (*self.arg_names, "warmup")}
        inside.append(self)
        try:
            return execute(self, *args, **known)
        finally:
            inside.pop()

    def tensors(*bounds: Any) -> Iterator[Any]:
        for each in builtins.range(*map(number, bounds)):
            yield tl.tensor(interpreter.TensorHandle(numpy.array([each], numpy.int32), tl.int32), tl.int32)

    def patch_core(language: Any) -> None:
        patch(language)
        language.range = lambda first, end=None, step=1, **_: tensors(*(first,) if end is None else (first, end, step))

    interpreter.GridExecutor.__call__, interpreter._patch_lang_core = run, patch_core
    for module in modules_with_kernels():
        module.range = lambda *bounds: (tensors if inside else builtins.range)(*bounds)
        if hasattr(module, "extract_slice"):
            module.extract_slice, module.insert_slice = extract_slice, insert_slice
    tl.extract_slice, tl.insert_slice = extract_slice, insert_slice


def number(value: Any) -> int:
    return int(value.handle.data.item()) if isinstance(value, tl.tensor) else int(getattr(value, "value", value))


def region(offsets: Any, sizes: Any, strides: Any) -> tuple[slice, ...]:
    bounds = zip(map(number, offsets), map(number, sizes), map(number, strides), strict=True)
    return tuple(slice(offset, offset + size * stride, stride) for offset, size, stride in bounds)


def extract_slice(whole: Any, offsets: Any, sizes: Any, strides: Any, **_: Any) -> Any:
    part = whole.handle.data[region(offsets, sizes, strides)].copy()
    handle = interpreter.TensorHandle(part, whole.handle.dtype)
    return tl.tensor(handle, tl.block_type(whole.type.scalar, list(part.shape)))


def insert_slice(whole: Any, part: Any, offsets: Any, sizes: Any, strides: Any, **_: Any) -> Any:
    data = whole.handle.data.copy()
    data[region(offsets, sizes, strides)] = part.handle.data
    return tl.tensor(interpreter.TensorHandle(data, whole.handle.dtype), whole.type)


def rule_call(values_per_key: int, from_state: bool, to_state: bool, tokens: int = 9, keys: int = 2, size: int = 16):
    heads = keys * values_per_key
    q, k = (torch.randn(1, tokens, keys, size, device="npu").bfloat16() for _ in range(2))
    v, g = torch.randn(1, tokens, heads, size, device="npu").bfloat16(), -torch.rand(1, tokens, heads, device="npu")
    state = torch.randn(1, heads, size, size, device="npu") if from_state else None
    return RuleCall(q, k, v, g, g.exp().bfloat16(), state, to_state, normalize=True)


def convolution_call(width: int, bias: bool, tokens: int = 9, channels: int = 32) -> ConvolutionCall:
    x = torch.randn(1, tokens, channels, device="npu").bfloat16().transpose(1, 2)
    weight = torch.randn(channels, width, device="npu").bfloat16()
    return ConvolutionCall(x, weight, torch.randn(channels, device="npu").bfloat16() if bias else None, "silu")


def recurrent(call: RuleCall, run: Callable[..., Any]) -> str | None:
    """Its forward; it has no Ascend kernel of its own and no derivative."""
    options = {"use_qk_l2norm_in_kernel": call.normalize, "output_final_state": call.output_final_state}
    o, final = run(call.q, call.k, call.v, g=call.g, beta=call.beta, initial_state=call.initial_state, **options)
    on_cpu = [tensor.cpu().double() for tensor in (call.q, call.k, call.v, call.g, call.beta)]
    state = None if call.initial_state is None else call.initial_state.cpu().double()
    expected, expected_final = recurrence(*on_cpu, state, call.normalize)
    for name, found, right in (("output", o, expected), ("final state", final, expected_final)):
        if found is not None:
            off = ((found.cpu().double() - right).norm() / right.norm()).item()
            if not off < 2.0**-6:
                return f"{name} is {off:.3g} of its size off"
    return None


def said(of: Callable[[], str | None]) -> str:
    try:
        return of() or "right"
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Refused:
    """A kernel, as triton-ascend's compiler refuses it."""

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError("ub overflow, requires 4259840 bits while 1572864 bits available!")


def run() -> dict[str, Any]:
    torch.manual_seed(0)
    present_npu(cores=1)
    complete_interpreter()
    found: dict[str, Any] = {"missing": [fla.RULE.missing(), fla.CONVOLUTION.missing()]}
    for kind in itertools.product((1, 3), (False, True), (False, True)):
        name = f"{kind[0]} values per key{', from a state' * kind[1]}{', to a state' * kind[2]}"
        found[f"chunk_gated_delta_rule: {name}"] = said(lambda kind=kind: why_wrong(fla.RULE, rule_call(*kind)))
        steps = importlib.import_module(fla.RULES).fused_recurrent_gated_delta_rule
        found[f"fused_recurrent: {name}"] = said(lambda kind=kind, steps=steps: recurrent(rule_call(*kind), steps))
    for width, bias in itertools.product((2, 3, 4), (False, True)):
        call = convolution_call(width, bias)
        found[f"causal_conv1d: {width} wide{', bias' * bias}"] = said(
            lambda call=call: why_wrong(fla.CONVOLUTION, call)
        )
    VERDICTS.clear()
    importlib.import_module("fla.ops.common.backends.triton_ascend.chunk_o").chunk_dqkwg_bwd_kernel_full = Refused()
    found["a kernel that does not compile"] = said(lambda: why_wrong(fla.RULE, rule_call(1, False, False)))
    return found


def record() -> dict[str, tuple[Launch, bool]]:
    """The kernels of forward and backward by name, at the sizes of Qwen3-Next, none of them run; and whether fla
    lets the compiler buffer twice."""
    present_npu(cores=20)
    launches: dict[str, tuple[Launch, bool]] = {}

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        given = dict(zip(self.arg_names, args, strict=False)) | {
            name: value for name, value in kwargs.items() if name in self.arg_names
        }
        given |= {p.name: p.default for p in self.params if p.name not in given and p.has_default}
        given = {name: given[name] for name in self.arg_names}
        constant = {p.name for p in self.params if p.is_constexpr} | {n for n, v in given.items() if v is None}
        signature = tuple((name, type_name(value)) for name, value in given.items() if name not in constant)
        constants = tuple((name, value) for name, value in given.items() if name in constant)
        one = Launch(self, signature, constants)
        name = f"{self.fn.__module__.removeprefix('fla.')}.{self.fn.__name__}"
        launches.setdefault(name, (one, kwargs.get("multibuffer", True)))

    triton.runtime.JITFunction.run = recorded
    list(modules_with_kernels())
    why = fla.RULE.missing() or fla.CONVOLUTION.missing()
    if why:
        raise SystemExit(why)
    sizes = {"tokens": 256, "keys": 16, "size": 128}

    def leaf(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().requires_grad_()

    call = rule_call(2, True, True, **sizes)
    call = RuleCall(*map(leaf, (call.q, call.k, call.v, call.g, call.beta, call.initial_state)), True, True)
    o, final = fla.run_rule(call)
    (o.sum() + final.sum()).backward()
    short = rule_call(2, True, True, **sizes)
    steps = importlib.import_module(fla.RULES).fused_recurrent_gated_delta_rule
    steps(short.q, short.k, short.v, g=short.g, beta=short.beta, use_qk_l2norm_in_kernel=True, output_final_state=True)
    wide = convolution_call(4, False, 256, 8192)
    wide = ConvolutionCall(leaf(wide.x), leaf(wide.weight), None, "silu")
    fla.run_convolution(wide).sum().backward()
    return launches


def compiled() -> dict[str, Any]:
    found = {}
    for name, (one, twice) in record().items():
        try:
            planned = plan(lower(one), multi_buffer=twice)
        except Exception as error:
            found[name] = {"refusal": f"not lowered: {str(error).strip().splitlines()[-1][:200]}"}
            continue
        found[name] = {
            "refusal": planned.refusal,
            "on_chip_bytes": planned.on_chip_bytes,
            "scalar_loops": len(planned.scalar_loops),
        }
    return found


if __name__ == "__main__":
    print(json.dumps({"run": run, "compile": compiled}[sys.argv[1]]()))
