"""Host time of patched calls against the originals': what a step that waits for the host waits for.

    python scripts/bench_host.py                       # each op with tiny tensors on the CPU, forward and backward
    python scripts/bench_host.py --device cuda         # the same on a GPU, and a whole LoRA step of few tokens

Microseconds, medians of blocks taken in turns, so that what else the machine does falls on both alike. On a GPU the
device is never waited for within a block: only the host is timed; on the CPU it is processor time. Goals: every op at
most 0.8 of the original's, the whole step at most 0.75 of unpatched. No number here says how fast a kernel is.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from npu_patch.commands.subject.families import without_broken_torch_npu

if "torch" not in sys.modules:
    without_broken_torch_npu()  # it is not measured here

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import npu_patch
from npu_patch.applying.state import patched_sites
from npu_patch.commands.bench.command import recorded_step
from npu_patch.commands.replay.recording import Call, function_of
from npu_patch.commands.replay.snapshot import snapshot
from npu_patch.commands.subject import models
from npu_patch.reporting.rows import short_name
from npu_patch.waiting.contract import materialised

FAMILIES = ("qwen3", "qwen3_moe", "qwen3_5")
OP_GOAL, STEP_GOAL = 0.8, 0.75
BLOCKS, CALLS = 15, 30


@dataclass(frozen=True)
class HostTime:
    """Medians in microseconds."""

    forward: float
    backward: float

    @property
    def both(self) -> float:
        return self.forward + self.backward


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    device = torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, one thread"
    torch.set_num_threads(1)
    print(
        f"Host microseconds of a call on {name}, torch {torch.__version__}: patched / original = ratio (goal {OP_GOAL})"
    )
    reached = []
    for family in options.families:
        for site, patched, original in ops(family, device, options.triton):
            ratio = patched.both / original.both
            reached.append(ratio <= OP_GOAL)
            forward = f"{patched.forward:7.1f} / {original.forward:7.1f}"
            backward = f"{patched.backward:7.1f} / {original.backward:7.1f}"
            verdict = "" if reached[-1] else "   goal missed"
            print(f"{family:<10} {site:<46} {forward}   {backward}   = {ratio:.2f}{verdict}", flush=True)
    print(f"{sum(reached)} of {len(reached)} calls reach the goal")
    if device.type == "cuda":
        step(device, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), metavar="TYPE")
    parser.add_argument("--triton", choices=("0", "1"), default="1", help="Triton kernels, on a GPU (default 1)")
    parser.add_argument("--tokens", type=int, default=128, help="of the whole step (default 128)")
    parser.add_argument("--layers", type=int, default=28, help="of the whole step (default 28)")
    return parser.parse_args()


def ops(family: str, device: torch.device, triton: str) -> Iterator[tuple[str, HostTime, HostTime]]:
    """Each kind of call that a training step of a tiny model makes."""
    model = models.source_of(family).make(0, False).to(device)
    batch = models.batch_for(model, batch=1, length=8)
    with npu_patch.applied(model, device=device.type, triton=device.type == "cuda" and triton == "1") as report:
        sites = [held for held in patched_sites(report) if function_of(held) is not None]
        recording = recorded_step(model, batch, device, sites)
        for held in sites:
            for call in recording.of(held)[:1]:
                times = in_turns([prepared(function_of(held), call, False), prepared(held.site.original, call, True)])
                if times is not None:
                    yield f"{held.outcome.patch} {short_name(held.outcome.site)}", *times


def prepared(function: Callable[..., Any], call: Call, plain_masks: bool) -> tuple[Callable[[], Any], list[Tensor]]:
    """The call, and the tensors whose gradients its backward computes."""

    def fresh(value: Any) -> Any:
        return snapshot(materialised(value, "the original") if plain_masks else value)

    args, kwargs = tree_map(fresh, (call.args, dict(call.kwargs)))
    leaves = tree_leaves((args, kwargs))
    wanting = [each for each in leaves if isinstance(each, Tensor) and each.requires_grad]
    for each in leaves:
        if isinstance(each, torch.nn.Module):
            wanting += [parameter for parameter in each.parameters() if parameter.requires_grad]
    return (lambda: function(*args, **kwargs)), wanting


def in_turns(forms: list[tuple[Callable[[], Any], list[Tensor]]]) -> list[HostTime] | None:
    """Of each form; None where nothing is computed that has a gradient, for forms of a fraction of a step."""
    samples: list[list[tuple[float, float]]] = [[] for _ in forms]
    gc.disable()
    try:
        for _ in range(BLOCKS):
            for taken, (form, wanting) in zip(samples, forms, strict=True):
                taken.append(block(form, wanting))
    finally:
        gc.enable()
    return [HostTime(*(statistics.median(part) * 1e6 for part in zip(*taken, strict=True))) for taken in samples]


def block(form: Callable[[], Any], wanting: list[Tensor]) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    synchronize()
    started = clock()
    results = [form() for _ in range(CALLS)]
    forward = clock() - started
    synchronize()
    outputs = [[o for o in tree_leaves(each) if isinstance(o, Tensor) and o.requires_grad] for each in results]
    if not outputs[0] or not wanting:
        return forward / CALLS, 0.0
    seeds = [torch.ones_like(output) for output in outputs[0]]
    synchronize()
    started = clock()
    for each in outputs:
        torch.autograd.grad(each, wanting, seeds, allow_unused=True)
    backward = clock() - started
    synchronize()
    return forward / CALLS, backward / CALLS


def clock() -> float:
    """Seconds. On the CPU those of this process, whatever else runs; a GPU's backward has a thread of its own."""
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step(device: torch.device, options: argparse.Namespace) -> None:
    """A LoRA step of a 1.7-billion Qwen3 with few tokens, which the host bounds."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

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
