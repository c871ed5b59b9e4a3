"""Every kernel at the shapes of five models, compiled for Ascend in a process of its own.

    python -m tests.kernels.ascend_cases FAMILY...       # prints JSON: tests/kernels/test_ascend_compile.py reads it

A process of its own, because the compiler takes kernels that were defined without the interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from npu_patch.kernels import gated_rms_norm as gated_kernels
from npu_patch.kernels import launch
from npu_patch.kernels import qk_norm_rope as qk_norm_kernels
from npu_patch.kernels import rms_norm as rms_norm_kernels
from npu_patch.kernels.cross_entropy import cross_entropy
from npu_patch.kernels.gamma import ONE_PLUS_WEIGHT, WEIGHT, Gamma
from npu_patch.kernels.gated_rms_norm import gated_rms_norm
from npu_patch.kernels.lora import tiling
from npu_patch.kernels.lora.adapted_linears import Group, adapted_linears
from npu_patch.kernels.qk_norm_rope import QKNorm, qk_norm_rope
from npu_patch.kernels.rms_norm import add_rms_norm, rms_norm
from npu_patch.kernels.swiglu import swiglu
from npu_patch.ops.chunked_loss import chunks
from scripts.ascend_compile import CORES, Launch, Plan, lower, plan, recorded_launches

TOKENS, EPS = 4096, 1e-6


@dataclass(frozen=True)
class Model:
    """The dimensions of a published configuration. `gamma` is how its norms use their weight."""

    hidden: int
    intermediate: tuple[int, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary: int
    gamma: Gamma = WEIGHT
    delta_heads: int = 0
    delta_dim: int = 128
    vocabulary: int = 151936


MODELS = {
    "Qwen3-0.6B": Model(1024, (3072,), 16, 8, 128, 128),
    "Qwen3-8B": Model(4096, (12288,), 32, 8, 128, 128),
    "Qwen3-32B": Model(5120, (25600,), 64, 8, 128, 128),
    "Qwen3-30B-A3B": Model(2048, (768, 6144), 32, 4, 128, 128),
    "Qwen3.5-35B-A3B": Model(2048, (512,), 16, 2, 256, 64, ONE_PLUS_WEIGHT, 32, vocabulary=248320),
}


def qk_norm_rope_cases(model: Model) -> None:
    tables = empty(1, TOKENS, model.rotary), empty(1, TOKENS, model.rotary)
    norm = QKNorm(EPS, EPS, model.gamma)
    q, k = empty(1, TOKENS, model.heads, model.head_dim), empty(1, TOKENS, model.kv_heads, model.head_dim)
    weights = [empty(model.head_dim), empty(model.head_dim)]
    trace(lambda *given: qk_norm_rope(*given, *tables, norm), q, k, *weights)
    trace(lambda q, k: qk_norm_rope(q, k, *weights, *tables, norm), q, k)


def swiglu_cases(model: Model) -> None:
    for width in model.intermediate:
        trace(swiglu, empty(1, TOKENS, width), empty(1, TOKENS, width))
        trace(lambda both: swiglu(*both.chunk(2, -1)), empty(1, TOKENS, 2 * width))


def add_rms_norm_cases(model: Model) -> None:
    x, weight = empty(1, TOKENS, model.hidden), empty(model.hidden)
    trace(lambda x, residual, weight: add_rms_norm(x, residual, weight, EPS, model.gamma), x, x.clone(), weight)
    trace(lambda x, residual: add_rms_norm(x, residual, weight, EPS, model.gamma), x, x.clone())
    trace(lambda x, weight: rms_norm(x, weight, EPS, model.gamma), x, weight)


def gated_rms_norm_cases(model: Model) -> None:
    if model.delta_heads:
        x, weight = empty(TOKENS * model.delta_heads, model.delta_dim), empty(model.delta_dim)
        for activation in ("silu", "sigmoid"):
            trace(lambda x, gate, w: gated_rms_norm(x, gate, w, EPS, activation), x, x.clone(), weight)  # noqa: B023
        trace(lambda x, gate: gated_rms_norm(x, gate, weight, EPS), x, x.clone())


def lora_cases(model: Model) -> None:
    """Groups of q, k and v, of gate and up, and single layers; of ranks, the least and the most that go together."""
    heads, kv_heads = model.heads * model.head_dim, model.kv_heads * model.head_dim
    for rank, dropout, dtype in ((8, 0.05, torch.float32), (16, 0.0, torch.bfloat16), (64, 0.1, torch.float32)):
        lora_case(model.hidden, (heads, kv_heads, kv_heads), rank, dropout, dtype)
    for width in model.intermediate:
        lora_case(model.hidden, (width, width), 16, 0.05, torch.float32)
        for needs in ("x adapters", "x", "adapters"):
            lora_case(width, (model.hidden,), 16, 0.05, torch.float32, needs)
        lora_case(width, (model.hidden,), tiling.MOST_RANK, 0.05, torch.float32)


def lora_case(
    width: int, outs: tuple[int, ...], rank: int, dropout: float, dtype: torch.dtype, needs: str = "x adapters"
) -> None:
    frozen_x, frozen = empty(1, TOKENS, width), []
    for out in outs:
        frozen += [torch.empty(shape, dtype=dtype, device="meta") for shape in ((rank, width), (out, rank))]

    def call(*given: Tensor) -> tuple[Tensor, ...]:
        x = given[0] if "x" in needs else frozen_x
        adapters = given[-len(frozen) :] if "adapters" in needs else frozen
        layers = [(empty(out, width), None, *adapters[2 * index :][:2]) for index, out in enumerate(outs)]
        return adapted_linears(x, layers, Group(2.0, dropout, torch.bfloat16))

    trace(call, *([frozen_x] if "x" in needs else []), *(frozen if "adapters" in needs else []))


def cross_entropy_cases(model: Model) -> None:
    """A chunk of the loss. Without a scale, in float32: log-probabilities."""
    rows = chunks(TOKENS, model.vocabulary)[0].stop
    labels, scale = (torch.empty(rows, dtype=dtype, device="meta") for dtype in (torch.int64, torch.float32))
    cross_entropy(empty(rows, model.vocabulary), labels, scale)
    cross_entropy(empty(rows, model.vocabulary).float(), labels, scale)
    cross_entropy(empty(rows, model.vocabulary).float(), labels)


def widest_cases() -> None:
    """Of the kernels that hold whole rows, the widest that the ops give them, with the weights that take most room."""
    machine = launch.Machine("npu", CORES, launch.UNIFIED_BUFFER, exact_widths=True)
    narrow, wide, headed = (
        launch.widest_row(machine, *kernels.TILES) for kernels in (rms_norm_kernels, gated_kernels, qk_norm_kernels)
    )
    x, weight = empty(TOKENS, narrow), torch.empty(narrow, device="meta")
    trace(lambda x, residual, w: add_rms_norm(x, residual, w, EPS, ONE_PLUS_WEIGHT), x, x.clone(), weight)
    trace(lambda x, w: rms_norm(x, w, EPS, ONE_PLUS_WEIGHT), x, weight)
    x, weight = empty(TOKENS, wide), torch.empty(wide, device="meta")
    trace(lambda x, gate, w: gated_rms_norm(x, gate, w, EPS, "silu", ONE_PLUS_WEIGHT), x, x.clone(), weight)
    headed -= headed % 8  # a quarter of it is rotated, in halves
    for rotary in (headed, headed // 4):
        tables, weight = empty(1, TOKENS, rotary), torch.empty(headed, device="meta")
        q, k, norm = empty(1, TOKENS, 4, headed), empty(1, TOKENS, 2, headed), QKNorm(EPS, EPS, ONE_PLUS_WEIGHT)
        trace(lambda *given: qk_norm_rope(*given, tables, tables, norm), q, k, weight, weight.clone())  # noqa: B023


FAMILIES: dict[str, Callable[[Model], None]] = {
    "qk_norm_rope": qk_norm_rope_cases,
    "swiglu": swiglu_cases,
    "add_rms_norm": add_rms_norm_cases,
    "gated_rms_norm": gated_rms_norm_cases,
    "lora": lora_cases,
    "cross_entropy": cross_entropy_cases,
}


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def trace(function: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """Runs the forward and the backward on the meta device, where launches are recorded."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.autograd.grad(outputs, leaves, [torch.empty_like(y) for y in outputs])


def launches(family: str) -> dict[Launch, list[str]]:
    """Each distinct specialization, with the models that use it."""
    found: dict[Launch, list[str]] = {}
    for name, model in MODELS.items():
        with recorded_launches() as recorded:
            FAMILIES[family](model)
        for one in dict.fromkeys(recorded):
            found.setdefault(one, []).append(name)
    return found


def compiled(family: str) -> list[dict[str, object]]:
    found = launches(family)
    sources = [lower(one) for one in found]
    with ThreadPoolExecutor(2) as pool:
        plans = list(pool.map(plan, sources))
    return [row(one, models, made) for (one, models), made in zip(found.items(), plans, strict=True)]


def row(one: Launch, models: list[str], made: Plan) -> dict[str, object]:
    constants = {name: value for name, value in one.constants if value is not None}
    return {"kernel": one.name, "models": models, "constants": constants, **asdict(made)}


def oversized() -> list[dict[str, object]]:
    """A tile of SwiGLU's backward that cannot fit, which the compiler must refuse."""
    one = next(one for one in launches("swiglu") if one.name == "swiglu._backward")
    constants = tuple((name, 16384 if name == "BLOCK" else value) for name, value in one.constants)
    one = replace(one, constants=constants)
    return [row(one, [], plan(lower(one)))]


def scalar() -> list[dict[str, object]]:
    """A gather, for which the chip has no vector instruction."""
    from tests.kernels import gather_kernel

    one = Launch(gather_kernel.gather, (("x", "*fp32"), ("index", "*i32"), ("y", "*fp32")), (("BLOCK", 256),))
    return [row(one, [], plan(lower(one)))]


def widest() -> list[dict[str, object]]:
    with recorded_launches() as recorded:
        widest_cases()
    found = list(dict.fromkeys(recorded))
    with ThreadPoolExecutor(2) as pool:
        return [row(one, [], made) for one, made in zip(found, pool.map(plan, map(lower, found)), strict=True)]


if __name__ == "__main__":
    special = {"oversized": oversized, "scalar": scalar, "widest": widest}
    print(json.dumps({name: special[name]() if name in special else compiled(name) for name in sys.argv[1:]}))
