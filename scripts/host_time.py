"""Host time of each patched call and of its original, of one checkout of the project: what bench_host.py runs.

    python scripts/host_time.py CHECKOUT --device cpu --families qwen3     # a line of JSON for each call

Medians of blocks taken in turns, so that what else the machine does falls on both alike. On a GPU the device is never
waited for within a block: only the host is timed; on the CPU it is processor time.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

BLOCKS, CALLS = 15, 30
# What is measured with, by where it is in this checkout and where it was in former ones.
PLACES = {
    "without_broken_torch_npu": ("npu_patch.commands.subject.families", "npu_patch.commands.families"),
    "patched_sites": ("npu_patch.applying.state", "npu_patch.lifecycle"),
    "recorded_step": ("npu_patch.commands.bench.command", "npu_patch.commands.bench"),
    "function_of": ("npu_patch.commands.replay.recording", "npu_patch.commands.recording"),
    "snapshot": ("npu_patch.commands.replay.snapshot", "npu_patch.commands.snapshot"),
    "source_of": ("npu_patch.commands.subject.models", "npu_patch.commands.models"),
    "batch_for": ("npu_patch.commands.subject.models", "npu_patch.commands.models"),
    "short_name": ("npu_patch.reporting.rows", "npu_patch.report_rows"),
    "plain": ("npu_patch.waiting.masks", "npu_patch.patches.mask_pattern"),
    "materialised": ("npu_patch.waiting.contract",),
}


@dataclass(frozen=True)
class HostTime:
    """Medians in microseconds."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Line:
    """Of one call; `operators`: the forward's own, where they were replaced by one each."""

    family: str
    site: str
    patched: HostTime
    original: HostTime
    operators: float | None = None


def main() -> None:
    warnings.filterwarnings("ignore")
    options = arguments()
    sys.path.insert(0, options.checkout)
    ours("without_broken_torch_npu")()  # it is not measured here
    import torch

    torch.set_num_threads(1)
    if options.one_operator:
        import one_operator

        one_operator.stand_in()
    for family in options.families:
        for line in lines(family, torch.device(options.device), options.triton, options.one_operator):
            print(json.dumps(asdict(line)), flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--families", nargs="+", required=True)
    parser.add_argument("--triton", choices=("0", "1"), default="1")
    parser.add_argument("--one-operator", action="store_true")
    return parser.parse_args()


def ours(name: str) -> Any:
    """What the measured checkout calls so."""
    for place in PLACES[name]:
        try:
            return getattr(importlib.import_module(place), name)
        except (ImportError, AttributeError):
            continue
    raise LookupError(f"{name} is in none of {', '.join(PLACES[name])} of this checkout")


def written_out(value: Any) -> Any:
    """What an original is given in place of a value that waits."""
    try:
        return ours("materialised")(value, "the original")
    except LookupError:
        return ours("plain")(value)


def lines(family: str, device: Any, triton: str, one_operator: bool) -> Iterator[Line]:
    """Each kind of call that a training step of a tiny model makes."""
    import npu_patch

    model = ours("source_of")(family).make(0, False).to(device)
    batch = ours("batch_for")(model, batch=1, length=8)
    with npu_patch.applied(model, device=device.type, triton=device.type == "cuda" and triton == "1") as report:
        sites = [held for held in ours("patched_sites")(report) if ours("function_of")(held) is not None]
        recording = ours("recorded_step")(model, batch, device, sites)
        for held in sites:
            for call in recording.of(held)[:1]:
                forms = [prepared(ours("function_of")(held), call, False), prepared(held.site.original, call, True)]
                if one_operator:
                    forms.append((operators_of(forms[0][0]), []))
                times = in_turns(forms)
                name = f"{held.outcome.patch} {ours('short_name')(held.outcome.site)}"
                yield Line(family, name, times[0], times[1], times[2].forward if one_operator else None)


def prepared(function: Callable[..., Any], call: Any, written: bool) -> tuple[Callable[[], Any], list[Any]]:
    """The call, and the tensors whose gradients its backward computes."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map

    snapshot = ours("snapshot")
    args, kwargs = tree_map(lambda value: snapshot(written_out(value) if written else value), (call.args, call.kwargs))
    leaves = tree_leaves((args, kwargs))
    wanting = [each for each in leaves if isinstance(each, torch.Tensor) and each.requires_grad]
    for each in leaves:
        if isinstance(each, torch.nn.Module):
            wanting += [parameter for parameter in each.parameters() if parameter.requires_grad]
    return (lambda: function(*args, **kwargs)), wanting


def operators_of(form: Callable[[], Any]) -> Callable[[], Any]:
    """The stand-ins that one call of `form` calls, with what it gave them."""
    import one_operator
    import torch

    called = one_operator.called_by(form)

    def again() -> None:
        for operator, args, kwargs, graded in called:
            with torch.set_grad_enabled(graded):
                operator(*args, **kwargs)

    return again


def in_turns(forms: list[tuple[Callable[[], Any], list[Any]]]) -> list[HostTime]:
    samples: list[list[tuple[float, float]]] = [[] for _ in forms]
    gc.disable()
    try:
        for _ in range(BLOCKS):
            for taken, (form, wanting) in zip(samples, forms, strict=True):
                taken.append(block(form, wanting))
    finally:
        gc.enable()
    return [HostTime(*(statistics.median(part) * 1e6 for part in zip(*taken, strict=True))) for taken in samples]


def block(form: Callable[[], Any], wanting: list[Any]) -> tuple[float, float]:
    """Seconds of one forward and of one backward."""
    import torch
    from torch.utils._pytree import tree_leaves

    synchronize()
    started = clock()
    results = [form() for _ in range(CALLS)]
    forward = clock() - started
    synchronize()
    outputs = [[o for o in tree_leaves(each) if isinstance(o, torch.Tensor) and o.requires_grad] for each in results]
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
    import torch

    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
