"""Host time of patched calls against the originals': what a step that waits for the host waits for.

    python scripts/bench_host.py                       # each op with tiny tensors on the CPU, forward and backward
    python scripts/bench_host.py --one-operator        # as where a fused operator is one call; what is our own
    python scripts/bench_host.py --before CHECKOUT     # another checkout of the project as well, in turns with this one
    python scripts/bench_host.py --device cuda         # on a GPU, and a whole LoRA step of few tokens

Microseconds, as host_time.py takes them. Goals: every op at most 0.8 of the original's, the whole step at most 0.75 of
unpatched. No number here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent
ROOT = SCRIPTS.parent
FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5")
OP_GOAL, STEP_GOAL = 0.8, 0.75
TURNS = 3  # of the checkouts, where there are two
WRONG_ON_PURPOSE = (
    "Each operator of torch_npu's is one of torch's here, and computes something else: results are wrong on purpose.\n"
    "Of a forward, what the operators take, and what is left: our own, and torch's views and autograd functions."
)
Line = dict[str, Any]


def main() -> None:
    options = arguments()
    checkouts = [ROOT] if options.before is None else [options.before.resolve(), ROOT]
    if options.one_operator:
        print(WRONG_ON_PURPOSE)
    print(f"Host microseconds on {options.device}, forward + backward; goal: {OP_GOAL} of the original's")
    turns: list[list[list[Line]]] = [[] for _ in checkouts]
    for _ in range(1 if len(checkouts) == 1 else TURNS):
        for taken, checkout in zip(turns, checkouts, strict=True):
            taken.append(measured(checkout, options))
    former = {} if len(checkouts) == 1 else {key(line): line for line in medians(turns[0])}
    reached = []
    for line in medians(turns[-1]):
        ratio = both(line["patched"]) / both(line["original"])
        reached.append(ratio <= OP_GOAL)
        print(f"{line['family']:<10} {line['site']:<46} {' '.join(parts(line, former))}   = {ratio:.2f}", flush=True)
    print(f"{sum(reached)} of {len(reached)} calls reach the goal")
    if options.device == "cuda":
        step(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="TYPE")
    parser.add_argument("--triton", choices=("0", "1"), default="1", help="Triton kernels, on a GPU (default 1)")
    parser.add_argument("--one-operator", action="store_true", help="on the CPU, what serves the NPU; see above")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another checkout, an older one perhaps")
    parser.add_argument("--tokens", type=int, default=128, help="of the whole step (default 128)")
    parser.add_argument("--layers", type=int, default=28, help="of the whole step (default 28)")
    options = parser.parse_args()
    if options.before is not None and not (options.before / "npu_patch").is_dir():
        parser.error(f"--before {options.before}: a checkout of this project has a folder npu_patch, this has none")
    if options.one_operator and options.device != "cpu":
        parser.error(f"--one-operator --device {options.device}: only the CPU stands in for an NPU")
    return options


def measured(checkout: Path, options: argparse.Namespace) -> list[Line]:
    """In a process of its own: two checkouts do not go into one."""
    command = [sys.executable, str(SCRIPTS / "host_time.py"), str(checkout), "--device", options.device]
    command += ["--triton", options.triton, *(["--one-operator"] if options.one_operator else [])]
    ran = subprocess.run([*command, "--families", *options.families], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]


def key(line: Line) -> tuple[str, str]:
    return line["family"], line["site"]


def both(times: dict[str, float]) -> float:
    return times["forward"] + times["backward"]


def medians(turns: list[list[Line]]) -> Iterator[Line]:
    """Of several turns' lines, one for each call."""
    for same in zip(*turns, strict=True):
        yield {
            **same[0],
            **{
                form: {part: statistics.median(line[form][part] for line in same) for part in ("forward", "backward")}
                for form in ("patched", "original")
            },
            "operators": None if None in (own := [line["operators"] for line in same]) else statistics.median(own),
        }


def parts(line: Line, former: dict[tuple[str, str], Line]) -> Iterator[str]:
    """The original's time, the former checkout's and this one's."""
    yield f"original {shown(line['original'])}"
    if key(line) in former:
        yield f"  before {shown(former[key(line)]['patched'])}  now {shown(line['patched'])}"
    else:
        yield f"  patched {shown(line['patched'])}"
    if line["operators"] is not None:
        yield f"  (operators {line['operators']:.1f}, left {line['patched']['forward'] - line['operators']:.1f})"


def shown(times: dict[str, float]) -> str:
    return f"{times['forward']:6.1f} + {times['backward']:6.1f}"


def step(options: argparse.Namespace) -> None:
    """A LoRA step of a 1.7-billion Qwen3 with few tokens, which the host bounds."""
    sys.path.insert(0, str(ROOT))
    warnings.filterwarnings("ignore")
    from npu_patch.commands.subject.families import without_broken_torch_npu

    without_broken_torch_npu()
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    import npu_patch

    device = torch.device(options.device)
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 16, "num_key_value_heads": 8}
    config = Qwen3Config(**sizes, vocab_size=151936, head_dim=128, num_hidden_layers=options.layers)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = Qwen3ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_dropout=0.05, target_modules="all-linear")).train()
    ids = torch.randint(0, 150000, (1, options.tokens), device=device)

    def one() -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
        return (time.perf_counter() - started) * 1e3

    ways: dict[str, dict[str, Any]] = {
        "unpatched": {"patch": False},
        "torch": {"triton": False},
        "triton": {"triton": True},
    }
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(5):
        for way, switches in ways.items():
            with npu_patch.applied(model, device=device.type, **switches):
                times = [one() for _ in range(6)]
            taken[way] += times[3:] if turn == 0 else times[1:]
    medians = {way: statistics.median(times) for way, times in taken.items()}
    print(f"LoRA step, {options.layers} layers, {options.tokens} tokens, GPU milliseconds:")
    for way, median in medians.items():
        print(f"  {way:<10} {median:7.1f}   {median / medians['unpatched']:.2f} of unpatched")
    best = min(medians["torch"], medians["triton"]) / medians["unpatched"]
    print(f"  goal {STEP_GOAL}: {'reached' if best <= STEP_GOAL else f'missed ({best:.2f})'}")


if __name__ == "__main__":
    main()
