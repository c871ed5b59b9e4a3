"""Times the Triton kernels on a CUDA device against eager transformers, torch, Liger-Kernel and the copy limit.

    python scripts/bench_kernels.py --output out/kernels              # table, kernels.json and kernels.png
    python scripts/bench_kernels.py --only "qk norm + rope" swiglu --tune    # the best tile of each kernel first

Each variant is checked first: the relative error (norm of the difference over the norm) of every result and gradient
against float64, which for ours may be 1.1 times that of eager at most. Then the variants are timed in turns, forward
alone and forward with backward, over several sets of inputs that together exceed the L2 cache, with CUDA events
around a run of calls that were queued while the device was busy: launch overhead on the host is not counted. Medians
in milliseconds. The limit is the time to copy as many bytes as the op must move, by the bandwidth measured here.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from scripts.bench_kernels_cases import LIGER, OURS, Case, all_cases

BAR = 1.1  # ours may be this much further from float64 than eager
FORWARD, BOTH = "forward", "forward + backward"
GOALS = {"qk norm + rope": 2.0, "swiglu": 1.1, "rms norm": 1.5, "add + rms norm": 1.5}  # of the limit, at most
GOALS_OVER_LIGER = {"qk norm + rope": 5.0}  # times faster, at least


def main() -> None:
    options = parse()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    torch.manual_seed(0)
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    bandwidth = copy_bandwidth(device)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": importlib.import_module("triton").__version__,
        "tokens": options.tokens,
        "dtype": options.dtype,
        "copy_bandwidth_tb_per_s": bandwidth / 1e12,
        "cases": {},
    }
    print(
        f"{record['device']}, torch {record['torch']}, triton {record['triton']}; {options.tokens} tokens, "
        f"{options.dtype}; copy bandwidth {bandwidth / 1e12:.2f} TB/s\n"
    )
    right = True
    for case in all_cases(options.tokens, dtype, device):
        if options.only and case.name not in options.only:
            continue
        record["cases"][case.name] = found = {"bytes": {FORWARD: case.bytes_forward, BOTH: case.bytes_both}}
        found["error"] = errors(case)
        if options.tune:
            found["tuned"] = tune(case, options)
        found["ms"] = {mode: timed(case, mode, options) for mode in (FORWARD, BOTH)}
        found["limit_ms"] = {mode: 1e3 * size / bandwidth for mode, size in found["bytes"].items()}
        right &= show(case, found)
        gc.collect()
        torch.cuda.empty_cache()
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "kernels.json").write_text(json.dumps(record, indent=1))
        draw(record, options.output / "kernels.png")
    if not right:
        sys.exit(f"further from float64 than {BAR} times eager, see above")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samples", type=int, default=15, help="timings of each variant, of which the median is taken")
    parser.add_argument("--calls", type=int, default=8, help="calls in one timing")
    parser.add_argument("--sets", type=int, default=3, help="sets of inputs, used in turn")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--tune", action="store_true", help="try tiles first; the best are used and printed")
    parser.add_argument("--tune-seconds", type=float, default=40, help="for each of a case's two kernels")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written in a second by a copy of 1 GiB, the best of 20."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(between_events(lambda: target.copy_(source), 1) for _ in range(20)) * 1e3


def errors(case: Case) -> dict[str, dict[str, float]]:
    """For each variant and result, the relative error against float64."""
    made = case.make()
    inputs, grads = made.inputs, made.grads
    exact = results(case.reference, [x.double() for x in inputs], [x.double() for x in grads], case.differentiable)
    found = {}
    for name, variant in case.variants.items():
        try:
            got = results(variant, [x.clone() for x in inputs], [x.clone() for x in grads], case.differentiable)
        except Exception as error:
            print(f"{case.name}, {name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        found[name] = {
            label: ((a.double() - b).norm() / b.norm()).item()
            for label, a, b in zip(case.labels, got, exact, strict=True)
        }
    return found


def results(
    function: Callable[..., Any], inputs: list[Tensor], grads: list[Tensor], differentiable: int
) -> tuple[Tensor, ...]:
    leaves = [x.requires_grad_() for x in inputs[:differentiable]]
    outputs = function(*leaves, *inputs[differentiable:])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return tuple(x.detach() for x in (*outputs, *torch.autograd.grad(outputs, leaves, grads)))


def timed(case: Case, mode: str, options: argparse.Namespace, only: str | None = None) -> dict[str, float]:
    """The median milliseconds of each variant, timed in turns."""
    runs = {
        name: rotation(case, variant, mode, options.sets)
        for name, variant in case.variants.items()
        if only in (None, name)
    }
    for name, run in list(runs.items()):
        try:
            for _ in range(3):
                run()
        except Exception as error:
            print(f"{case.name}, {name}, {mode}: {type(error).__name__}: {str(error)[:300]}")
            del runs[name]
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.samples):
        for name, run in runs.items():
            samples[name].append(between_events(run, options.calls))
    return {name: statistics.median(times) for name, times in samples.items()}


def rotation(case: Case, variant: Callable[..., Any], mode: str, sets: int) -> Callable[[], Any]:
    """Each call takes the next set of inputs. A variant has its own, for some write into what they are given."""
    made = [case.make() for _ in range(sets)]
    turn = itertools.count()

    def forward() -> None:
        with torch.no_grad():
            variant(*made[next(turn) % sets].inputs)

    def both() -> None:
        one = made[next(turn) % sets]
        results(variant, one.inputs, one.grads, case.differentiable)

    return forward if mode == FORWARD else both


def between_events(run: Callable[[], Any], calls: int) -> float:
    """Milliseconds of the device for one call, all calls being queued before the first runs."""
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(int(2e9 * (1.5 * host * calls + 5e-4)))  # about 2e9 cycles in a second
    start.record()
    for _ in range(calls):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


TRIALS = {  # of each setting of a tile; programs matter only where they leave partial sums
    "stages": (1, 2, 3),
    "elements": (1024, 2048, 4096, 8192),
    "elements_per_thread": (8, 16, 32, 64),
    "programs": (1, 2, 3, 4, 6, 8),
}


def tune(case: Case, options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Tries tiles for our forward, then for our backward, one setting after the other, twice over or until the time
    is up; leaves the best in place."""
    if case.tiles is None:
        return {}
    module = importlib.import_module(case.tiles)
    quick = argparse.Namespace(**{**vars(options), "samples": 5})
    best = {}
    for which, mode in (("FORWARD", FORWARD), ("BACKWARD", BOTH)):
        given, until = getattr(module, which), time.monotonic() + options.tune_seconds
        tried: dict[Any, float] = {}

        def milliseconds(tile: Any) -> float:
            if tile not in tried:  # noqa: B023
                setattr(module, which, tile)  # noqa: B023
                tried[tile] = timed(case, mode, quick, OURS).get(OURS, float("inf"))  # noqa: B023
            return tried[tile]  # noqa: B023

        chosen = given
        for setting, values in (*TRIALS.items(), *TRIALS.items()):
            if setting == "programs" and (which == "FORWARD" or not case.has_partial_sums):
                continue
            trials = [chosen, *(dataclasses.replace(chosen, **{setting: value}) for value in values)]
            chosen = min((tile for tile in trials if tile in tried or time.monotonic() < until), key=milliseconds)
        setattr(module, which, chosen)
        best[which] = dataclasses.asdict(chosen)
        ranked = sorted(tried.items(), key=lambda item: item[1])
        for tile, ms in [*ranked[:4], *((tile, ms) for tile, ms in ranked if tile == given)]:
            settings = ", ".join(f"{name}={getattr(tile, name)}" for name in TRIALS)
            print(f"{case.name} {which}: {ms:.4f} ms with {settings}{' (given)' if tile == given else ''}")
    return best


def show(case: Case, found: dict[str, Any]) -> bool:
    """Prints one case; false where ours is too far from float64."""
    print(f"{case.name}: {case.description}")
    limit = found["limit_ms"]
    print(f"  {'':26}{'forward':>10}{'/ limit':>9}{'fwd + bwd':>11}{'/ limit':>9}{'ours is':>10}   largest error")
    print(f"  {'limit':26}{limit[FORWARD]:10.4f}{1:9.2f}{limit[BOTH]:11.4f}{1:9.2f}")
    ours = found["ms"][BOTH].get(OURS, float("nan"))
    for name in case.variants:
        forward, both = (found["ms"][mode].get(name, float("nan")) for mode in (FORWARD, BOTH))
        worst = max(found["error"].get(name, {"": float("nan")}).items(), key=lambda item: item[1])
        print(
            f"  {name:26}{forward:10.4f}{forward / limit[FORWARD]:9.2f}{both:11.4f}{both / limit[BOTH]:9.2f}"
            f"{both / ours:9.2f}x   {worst[1]:.2e} {worst[0]}"
        )
    goal = GOALS.get(case.name)
    if goal is not None:
        print(f"  goal: {goal} times the limit: {'reached' if ours <= goal * limit[BOTH] else 'NOT reached'}")
    goal, liger = GOALS_OVER_LIGER.get(case.name), found["ms"][BOTH].get(LIGER)
    if goal is not None and liger is not None:
        word = "reached" if liger >= goal * ours else "NOT reached"
        at_the_limit = liger / limit[BOTH]
        print(f"  goal: {goal} times faster than Liger: {word}; at the limit it would be {at_the_limit:.2f} times")
    eager, mine = found["error"].get(case.eager, {}), found["error"].get(OURS, {})
    wrong = [
        f"{label} {mine[label]:.2e} (eager {eager[label]:.2e})" for label in mine if mine[label] > bar(eager[label])
    ]
    for line in wrong or ([] if mine else ["ours did not run"]):
        print(f"  WRONG: {line}")
    print()
    return bool(mine) and not wrong


def bar(eager: float) -> float:
    return max(BAR * eager, 1e-6)


def draw(record: dict[str, Any], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no matplotlib: no PNG")
        return
    cases = {name: found for name, found in record["cases"].items() if found["ms"][BOTH]}
    names = list(dict.fromkeys(variant for found in cases.values() for variant in found["ms"][BOTH]))
    figure, axes = pyplot.subplots(figsize=(2 + 1.7 * len(cases), 4.5))
    for index, variant in enumerate(names):
        heights = [found["ms"][BOTH].get(variant, 0) / found["limit_ms"][BOTH] for found in cases.values()]
        places = [place + 0.8 * (index - (len(names) - 1) / 2) / len(names) for place in range(len(cases))]
        bars = axes.bar(places, heights, 0.8 / len(names), label=variant)
        axes.bar_label(bars, [f"{height:.1f}" if height else "" for height in heights], fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [name.replace(" + ", "\n+ ") for name in cases], fontsize=8)
    axes.set_ylabel("forward + backward, times the copy limit")
    axes.set_title(f"{record['device']}, {record['tokens']} tokens, {record['dtype']}: lower is better", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
