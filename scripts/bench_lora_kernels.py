"""Checks and times the kernels of adapters on a CUDA device, at the layers of a Qwen3 of 1.7 billion parameters.

    python scripts/bench_lora_kernels.py --tokens 4096 --rank 8 --dropout 0.05 --output out/kernels/lora.json

First every output and gradient against float64, with the mask that the kernels draw; then milliseconds, medians of runs
that were queued while the device was busy: each kernel beside the time that copying what it must move takes, and the
whole group forward and with its backward, beside its frozen products alone and beside what peft computes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from npu_patch.kernels import launch
from npu_patch.kernels.lora import input_side, output_side
from npu_patch.kernels.lora.adapted_linears import Group, adapted_linears
from npu_patch.kernels.lora.expand import expand_
from npu_patch.kernels.lora.seed import drawn_seed
from npu_patch.kernels.lora.shrink import shrink
from tests.kernels.lora.mask_kernel import mask

LAYERS = {
    "q, k, v": (2048, (2048, 1024, 1024)),
    "o": (2048, (2048,)),
    "gate, up": (2048, (6144, 6144)),
    "down": (6144, (2048,)),
}
SCALING, SEED = 2.0, 7
BAR = 1.1  # ours may be this much further from float64 than what peft computes


@dataclass(frozen=True)
class Made:
    """A group: x, its layers' weight, A and B each, and the gradients of its outputs."""

    x: Tensor
    weights: list[Tensor]
    downs: list[Tensor]
    ups: list[Tensor]
    dys: list[Tensor]

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.downs, *self.ups]


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    record: dict[str, Any] = {"device": torch.cuda.get_device_name(), **vars(options), "cases": {}}
    bandwidth = copy_bandwidth()
    print(f"{record['device']}; {options.tokens} tokens, rank {options.rank}, dropout {options.dropout}")
    right = True
    for name, (width, outs) in LAYERS.items():
        made = group(options, width, outs)
        errors = errors_of(made, options.dropout)
        worst = max(own / (1e-6 + theirs) for own, theirs in errors)
        right &= worst <= BAR
        ms = {part: timed(run) for part, run in wholes(made, options.dropout).items()}
        parts = {part: (timed(run), 1e3 * size / bandwidth) for part, (run, size) in kernels(made, options).items()}
        record["cases"][name] = {"error over peft's": worst, "ms": ms, "kernels, and their limits": parts}
        print(f"\n{name}: at most {worst:.2f} of peft's error and 1e-6; of each output and gradient, ours / peft's:")
        print("  " + ", ".join(f"{own:.1e} / {theirs:.1e}" for own, theirs in errors))
        print("".join(f"  {part:32} {value:7.4f} ms\n" for part, value in ms.items()), end="")
        print("".join(f"  {part:32} {one:7.4f} ms, limit {two:.4f}\n" for part, (one, two) in parts.items()), end="")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(record, indent=1, default=str))
    if not right:
        sys.exit(f"further from float64 than {BAR} times what peft computes, see above")


def group(options: argparse.Namespace, width: int, outs: tuple[int, ...], device: str = "cuda") -> Made:
    torch.manual_seed(0)
    half, adapter = torch.bfloat16, getattr(torch, options.adapter)

    def normal(*shape: int, dtype: torch.dtype = half) -> Tensor:
        return (torch.randn(shape, device=device) / (shape[-1] ** 0.5 if shape[0] != options.tokens else 1)).to(dtype)

    return Made(
        normal(options.tokens, width).requires_grad_(),
        [normal(out, width) for out in outs],
        [normal(options.rank, width, dtype=adapter).requires_grad_() for _ in outs],
        [normal(out, options.rank, dtype=adapter).requires_grad_() for out in outs],
        [normal(options.tokens, out) for out in outs],
    )


def ours(made: Made, dropout: float) -> tuple[Tensor, ...]:
    layers = [(w, None, a, b) for w, a, b in zip(made.weights, made.downs, made.ups, strict=True)]
    return adapted_linears(made.x, layers, Group(SCALING, dropout, made.weights[0].dtype))


def peft(made: Made, drop: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, ...]:
    results = []
    for index, (weight, down, up) in enumerate(zip(made.weights, made.downs, made.ups, strict=True)):
        y = F.linear(made.x, weight)
        added = F.linear(F.linear(drop(made.x.to(down.dtype), index), down), up) * SCALING
        results.append((y + added).to(y.dtype))
    return tuple(results)


def errors_of(made: Made, dropout: float) -> list[tuple[float, float]]:
    """Of each output and gradient: ours, and what peft computes under the same masks."""
    torch.manual_seed(SEED)
    seed = drawn_seed(made.x.device) if dropout else None

    def drop(x: Tensor, index: int) -> Tensor:
        return (
            x
            if seed is None
            else torch.where(mask(seed, index, *x.shape, dropout, device=x.device), x, 0.0) / (1 - dropout)
        )

    exact = Made(*(_double(part) for part in vars(made).values()))
    torch.manual_seed(SEED)
    found = [_both(ours(made, dropout), made), _both(peft(made, drop), made), _both(peft(exact, drop), exact)]
    return [(_far(own, true), _far(theirs, true)) for own, theirs, true in zip(*found, strict=True)]


def wholes(made: Made, dropout: float) -> dict[str, Callable[[], Any]]:
    def frozen() -> tuple[Tensor, ...]:
        return tuple(F.linear(made.x, weight) for weight in made.weights)

    def original() -> tuple[Tensor, ...]:
        return peft(made, lambda x, index: F.dropout(x, dropout) if dropout else x)

    functions = {"frozen alone": frozen, "ours": lambda: ours(made, dropout), "peft": original}
    found: dict[str, Callable[[], Any]] = {f"{name}, forward": run for name, run in functions.items()}
    for name, run in functions.items():
        leaves = [made.x] if run is frozen else made.leaves()
        found[f"{name}, forward and backward"] = lambda run=run, leaves=leaves: torch.autograd.grad(
            run(), leaves, made.dys
        )
    return found


def kernels(made: Made, options: argparse.Namespace) -> dict[str, tuple[Callable[[], Any], int]]:
    """Each kernel of a group, and how many bytes it must move."""
    x, dropout, device = made.x.detach(), options.dropout, made.x.device
    downs, ups = [each.detach() for each in made.downs], [each.detach() for each in made.ups]
    seed = drawn_seed(device) if dropout else None
    (rows, width), rank = x.shape, options.rank
    h = shrink(x, downs, seed, dropout)
    ys, dx = [dy.clone() for dy in made.dys], torch.zeros_like(x)
    up_size, down_size = sum(up.numel() for up in ups), sum(down.numel() for down in downs)
    splits = input_side.rows_are_split_in(launch.machine_of(device), width, rows, rank)
    partial = torch.empty(splits, up_size + down_size, device=device)
    outputs, adapters = 2 * sum(y.numel() for y in ys), 4 * (up_size + down_size)
    small = 4 * h.numel() + adapters // 2

    def side() -> None:
        rest = partial[:, up_size:]
        input_side.add_input_side(dx, rest, x, h, downs, width, seed, dropout, x.dtype)

    return {
        "shrink": (lambda: shrink(x, downs, seed, dropout), 2 * x.numel() + small),
        "expand": (lambda: expand_(ys, h, ups, SCALING), 2 * outputs + small),
        "through adapters": (lambda: output_side.through_adapters(made.dys, ups, SCALING), outputs + small),
        "sums of dB": (lambda: output_side.sum_ups(partial, made.dys, h, SCALING), outputs + small),
        "input side": (side, 6 * x.numel() + small),
    }


def timed(run: Callable[[], Any], runs: int = 20, rounds: int = 5) -> float:
    """Milliseconds of one run: the device is kept busy while the host queues them."""
    for _ in range(3):
        run()
    found = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(50_000_000)
        start.record()
        for _ in range(runs):
            run()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / runs)
    return statistics.median(found)


def copy_bandwidth(size: int = 2**28) -> float:
    """Bytes read and written a second."""
    source, target = (torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2e3 * size / timed(lambda: target.copy_(source))


def _both(ys: tuple[Tensor, ...], made: Made) -> list[Tensor]:
    return [*ys, *torch.autograd.grad(ys, made.leaves(), made.dys)]


def _double(part: Any) -> Any:
    if isinstance(part, list):
        return [_double(each) for each in part]
    return part.detach().double().requires_grad_(part.requires_grad)


def _far(got: Tensor, exact: Tensor) -> float:
    return float((got.detach().double() - exact.detach()).norm() / exact.detach().norm())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--adapter", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
