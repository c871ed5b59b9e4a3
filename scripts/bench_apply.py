"""Time of `apply(model)`: first, with every check of operators to do, and second, with what the first one kept.

    python -m npu_patch.simulator scripts/bench_apply.py [--layers 60] [--profile] [model ...]

Models of 60 layers: tiny ones with weights on the device, and real widths on the meta device. On a simulated NPU the
checks are asked for, and so is choosing between operators and Triton kernels by time, with kernels that cost nothing
and a clock that is made up: what remains is what npu_patch does itself, and float64 on the host. Limits: 10 s and 1 s,
of wall time; on a simulated NPU of processor time, as nothing waits for a device there, and others may use the machine.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import pstats
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

import npu_patch
import npu_patch.simulator
from npu_patch.applying import api as lifecycle
from npu_patch.applying import enabling
from npu_patch.measuring import measure
from npu_patch.measuring import measurer as selection
from npu_patch.ops import add_rms_norm, qk_norm_rope
from npu_patch.patches.patch import Patch
from npu_patch.serving.case import Clock, Measured
from npu_patch.serving.implementation import Implementation

LIMITS = (10.0, 1.0)  # seconds, first and second
TINY = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TINY_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
# As published for Qwen3-32B and Qwen3-30B-A3B.
DENSE = {
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
MOE = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
MODELS: dict[str, tuple[str, dict[str, int], str]] = {
    "tiny dense": ("Qwen3Config", TINY, "npu"),
    "tiny MoE": ("Qwen3MoeConfig", {**TINY, **TINY_EXPERTS}, "npu"),
    "real dense": ("Qwen3Config", DENSE, "meta"),
    "real MoE": ("Qwen3MoeConfig", MOE, "meta"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*MODELS], metavar="model", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--profile", action="store_true", help="the 25 functions that take the most, of the second")
    options = parser.parse_args()
    unknown = [name for name in options.models if name not in MODELS]
    if unknown:
        parser.error(f"no such model: {unknown[0]!r}; there are {', '.join(MODELS)}")
    _make_up_kernels()
    print(f"{'':12}  {'':8}{'wall':>8}{'processor':>11}{'limit':>8}")
    kept = True
    for name in options.models:
        model = _model(name, options.layers)
        with tempfile.TemporaryDirectory() as folder:
            for which, limit in zip(("first", "second"), LIMITS, strict=True):
                profiled = options.profile and which == "second"
                wall, processor = _timed(model, str(Path(folder) / "found.json"), profiled)
                within = (processor if npu_patch.simulator.is_active() else wall) <= limit
                kept, words = kept and within, "" if within else "  NOT KEPT"
                print(f"{name:12}  {which:8}{wall:7.2f}s{processor:10.2f}s{limit:7.0f}s{words}", flush=True)
    return 0 if kept else 1


def _model(name: str, layers: int) -> torch.nn.Module:
    config_name, sizes, device = MODELS[name]
    config = getattr(transformers, config_name)(**sizes, num_hidden_layers=layers)
    with torch.device("meta") if device == "meta" else torch.device("cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model if device == "meta" else model.to(device)


def _timed(model: torch.nn.Module, path: str, profiled: bool) -> tuple[float, float]:
    """Wall and processor time of one `apply(model)`, which is undone."""
    profile = cProfile.Profile()
    wall, processor = time.perf_counter(), time.process_time()
    report = profile.runcall(_apply, model, path) if profiled else _apply(model, path)
    spent = time.perf_counter() - wall, time.process_time() - processor
    for line in (*report.warnings, *(each.reason for each in report.failed)):
        print(f"  {line}", file=sys.stderr)
    npu_patch.restore()
    if profiled:
        pstats.Stats(profile).sort_stats("cumulative").print_stats(25)
    return spent


def _apply(model: torch.nn.Module, path: str) -> npu_patch.Report:
    return npu_patch.apply(model, self_check=True, triton_cache=path)


def _make_up_kernels() -> None:
    """Where the NPU is simulated: beside each operator for which there is an optional kernel, the operator again."""
    if not npu_patch.simulator.is_active():
        return
    made_up = iter(range(1, 1 << 30))

    def clock(device: torch.device) -> Clock:
        def times(forms: Mapping[str, Callable[[], Any]]) -> dict[str, Measured]:
            for form in forms.values():
                form()
            return {name: Measured(seconds=1e-3 * next(made_up)) for name in forms}

        return times

    usual = {patch.name: _usual(patch.op.implementations) for patch in lifecycle.CATALOGUE}
    norm, rope = usual["rms_norm"], usual["rope"]
    fused = {
        "qk_norm_rope": qk_norm_rope.one_after_the_other(norm.run, rope.run),
        "add_rms_norm": add_rms_norm.one_after_the_other(norm.run),
    }

    def with_kernel(patch: Patch) -> Patch:
        if patch.name in fused:
            kernel = dataclasses.replace(norm, name="made up", optional=True, run=fused[patch.name], unsupported=_never)
            return _of(patch, kernel)
        if not any(each.optional for each in patch.op.implementations):
            return patch
        kernel = dataclasses.replace(usual[patch.name], name="made up", optional=True)
        return _of(patch, kernel, usual[patch.name])

    catalogue = [with_kernel(patch) for patch in lifecycle.CATALOGUE]
    lifecycle.CATALOGUE = tuple(catalogue)
    measure.ELEMENTS = 2**12
    enabling.choose = _choosing_by_time(enabling.choose)
    selection.clock = clock


def _usual(implementations: Sequence[Implementation]) -> Implementation | None:
    return next((each for each in implementations if not each.optional and "npu" in each.device_types), None)


def _of(patch: Patch, *implementations: Implementation) -> Patch:
    return dataclasses.replace(patch, op=dataclasses.replace(patch.op, implementations=implementations))


def _never(*call: Any) -> None:
    """Why it would not take a call."""


def _choosing_by_time(choose: Callable[..., Any]) -> Callable[..., Any]:
    """As on a real device, where times mean something."""

    def choosing(implementations: Any, device_type: str, asked: bool | str = False, source: str = "default") -> Any:
        found = choose(implementations, device_type, True if asked == "auto" else asked, source)
        return dataclasses.replace(found, forced=False) if asked == "auto" else found

    return choosing


if __name__ == "__main__":
    sys.exit(main())
